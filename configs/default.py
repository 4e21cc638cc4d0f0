# SPDX-License-Identifier: Apache-2.0
"""All config keys, with their defaults: the published recipe of TNT-S on ImageNet-1k.

The other files start from this one and change values. Any key can be set on the command line:
--config.batch_size=256 --config.data.root=/data/imagenet. Values of the keys named `every` are
"N epochs" or "N steps".
"""

from collections.abc import Iterable

from ml_collections import ConfigDict, config_dict

from tnt_flax.core.errors import InputError


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 42  # of initial weights, data order, augmentation and dropout
    config.epochs = 300  # warm-up and cosine; optimizer.cooldown_epochs are added
    config.batch_size = 1024  # images per step, over all devices and hosts
    config.accumulate = 1  # micro-batches that a step computes in turn, to save memory
    config.stall_minutes = 30.0  # watchdog: ends a run without a step or eval batch; 0 disables
    config.deterministic = False  # True: resume is bit-identical on GPUs, too; slower
    config.init_from = ""  # initial weights of any framework: file, workdir or hf:// address

    # Device mesh. The sizes may change on resume (results then differ by rounding).
    config.mesh = ConfigDict()
    config.mesh.data = -1  # data parallelism; -1 is all remaining devices
    config.mesh.fsdp = 1  # data parallelism with sharded weights, EMA and optimizer state (ZeRO)
    config.mesh.tensor = 1  # tensor parallelism: heads and MLP of the outer transformer
    # dtype in which gradients are summed over devices, fixed on resume. "bfloat16" halves the
    # traffic for dense and conv kernels and needs model.dtype="bfloat16".
    config.mesh.gradient_dtype = "float32"

    config.model = ConfigDict()
    config.model.name = "tnt_s_patch16_224"  # of tnt_flax.list_models(); "": that of the weights
    config.model.drop_path = 0.1  # stochastic depth rate of the last block, linear from 0
    config.model.uniform_drop_path = False  # the rate of all blocks (DeiT-III)
    config.model.dropout = 0.0  # of embeddings, attention outputs and MLPs
    config.model.attention_dropout = 0.0  # of attention weights
    config.model.dtype = "bfloat16"  # activations; weights, norms and softmax are float32
    # "auto", or an implementation of the same function, equal up to rounding: "reference", "cpu",
    # "gpu"; for TNT also "pallas", for TPUs. The inner transformer of TNT also has "lanes", for
    # TPUs, and "mosaic", for Hopper GPUs.
    config.model.inner_impl = "auto"  # of the inner transformer
    config.model.outer_impl = "auto"  # of the outer transformer
    config.model.remat = "auto"  # rematerialization: "none" or "block"; auto: block, except on CPUs
    config.model.unroll = False  # compiles every block separately, see docs/speed.md
    # Architecture: unset fields come from the name.
    config.model.depth = config_dict.placeholder(int)  # number of blocks
    config.model.depths = config_dict.placeholder(tuple)  # PyramidTNT: blocks of its four stages
    config.model.outer_dim = config_dict.placeholder(int)  # width of a sentence
    config.model.inner_dim = config_dict.placeholder(int)  # width of a word
    config.model.outer_heads = config_dict.placeholder(int)
    config.model.inner_heads = config_dict.placeholder(int)
    config.model.patch_size = config_dict.placeholder(int)  # pixels per side of a sentence
    config.model.inner_stride = config_dict.placeholder(int)  # pixels from word to word
    config.model.mlp_ratio = config_dict.placeholder(float)  # hidden width of the MLPs / width
    config.model.se = config_dict.placeholder(bool)  # squeeze-and-excitation (paper Table 12)
    config.model.layer_scale = config_dict.placeholder(bool)  # LayerScale in both transformers
    config.model.vanilla_blocks = config_dict.placeholder(tuple)  # blocks without words (Table 5)

    config.data = ConfigDict()
    # "folder", "table" (CSV, JSON lines, Parquet), "imagenet_tars", "webdataset", "tfds", "digits"
    config.data.source = "folder"
    config.data.root = ""  # folder, table, or gs:// or hf:// address; of tfds the data_dir
    config.data.name = ""  # tfds data set, such as "cifar10" or "imagenet2012:5.1.0"
    config.data.train_split = "train"  # name; for shards and tables also a path or pattern
    config.data.eval_split = "validation"  # if missing: valid, val, ..., test, the first found
    config.data.holdout = 0.0  # fraction held out if a folder or table has no evaluation split
    config.data.class_list = ""  # file with one class per line, in order; "" sorts the names
    config.data.class_order = "natural"  # order without class_list; "string" is torchvision's
    config.data.subset = False  # leave out classes that are not in class_list
    config.data.balanced = False  # all classes equally often: repeats images of small classes
    config.data.image_column = ""  # table: paths, bytes, or "images/{id}.jpg"; "" finds the column
    config.data.label_column = ""  # table: names or numbers; "" finds the column
    config.data.split_column = ""  # table with all splits: train, val, ...; "" finds the column
    config.data.eval_labels = ""  # ImageNet's validation labels: a file; "" searches for one
    # Pixels, or (height, width). FieldReference(..., object): values of any type are accepted.
    config.data.image_size = config_dict.FieldReference(224, object)
    config.data.crop_fraction = 0.9  # evaluation: resize to image_size / crop_fraction, then crop
    config.data.mean = (0.5, 0.5, 0.5)  # per channel, pixels scaled to [0, 1]
    config.data.std = (0.5, 0.5, 0.5)
    # How images become 8-bit RGB; the defaults give timm's pixels.
    config.data.exif = False  # turn images upright by their EXIF orientation
    config.data.background = ()  # RGB color, 0 to 255, behind transparency; () drops alpha
    # How 16-bit and float pixels become 0..255: "clip"; "minmax" scales the range of each image;
    # (low, high) scales this range.
    config.data.deep_pixels = config_dict.FieldReference("clip", object)
    config.data.max_pixels = -1  # larger images are corrupt; -1 is Pillow's limit, 0 is no limit
    config.data.corrupt = "error"  # or "skip": replace unreadable images; evaluation omits them
    config.data.threads = 8  # that decode and augment, in each process that reads images
    config.data.workers = 0  # reader processes per training process; 0: only its threads read
    config.data.retry_seconds = 120.0  # retry storage errors (not corrupt images) for this long

    config.augment = ConfigDict()
    config.augment.scale = (0.08, 1.0)  # random resized crop: area as a fraction of the image
    config.augment.ratio = (3 / 4, 4 / 3)  # random resized crop: aspect ratio
    config.augment.resampling = "pillow"  # same pixels as timm; "opencv": faster, slightly off
    config.augment.interpolation = "random"  # of bicubic and bilinear; or one of them
    config.augment.flip = 0.5  # probability of a horizontal flip
    config.augment.randaugment = "rand-m9-mstd0.5-inc1"  # in timm's notation; "" disables
    config.augment.randaugment_on = "host"  # "device": in the step, for GPUs; see docs/data.md
    config.augment.three_augment = False  # DeiT-III's 3-Augment, before color_jitter
    config.augment.color_jitter = 0.4  # brightness, contrast, saturation; ignored with randaugment
    config.augment.repeats = 3  # views per image; an epoch covers 1/repeats of the images
    config.augment.label_smoothing = 0.1
    config.augment.mixup_alpha = 0.8  # mixing weights are Beta(alpha, alpha); 0 disables mixup
    config.augment.cutmix_alpha = 1.0  # likewise; 0 disables CutMix
    # Groups of rows with a mixing weight each. With mix_groups >= repeats, the views of an image
    # are in different groups.
    config.augment.mix_groups = 8
    config.augment.mix_prob = 1.0  # probability of mixing a group
    config.augment.mix_switch_prob = 0.5  # probability of CutMix instead of mixup
    config.augment.mix_off_epochs = 0  # last epochs without mixup and CutMix, cool-down included
    config.augment.erase_prob = 0.25  # random erasing, after mixing: probability per image
    config.augment.erase_area = (0.02, 1 / 3)  # random erasing: area as a fraction of the image
    config.augment.erase_ratio = (0.3, 1 / 0.3)  # random erasing: aspect ratio

    config.loss = ConfigDict()
    config.loss.name = "softmax"  # cross entropy; or "bce": one sigmoid per class
    config.loss.bce_threshold = config_dict.placeholder(float)  # targets above are 1, others 0
    config.loss.bce_sum = False  # sum over the classes instead of the mean
    # "balanced": in inverse proportion to the images of a class; or a CSV file: class,weight
    config.loss.class_weights = ""

    config.distill = ConfigDict()
    # Weights of any network (file, workdir or hf:// address), or a file of `predict --logits`.
    config.distill.teacher = ""
    config.distill.kind = "soft"  # KL divergence; "hard": the class that the teacher predicts
    config.distill.temperature = 1.0  # divides all logits, for "soft"
    config.distill.weight = 0.5  # of the distillation in the loss; 1: without labels

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or "nadamw", "lamb", "lion", "muon", "sgd"
    config.optimizer.schedule = "cosine"  # or "linear"; "constant" decays in the cool-down only
    config.optimizer.schedule_interval = "epoch"  # as published; or "step": change in every step
    config.optimizer.learning_rate = 1e-3  # peak; not scaled by the batch size
    config.optimizer.warmup_learning_rate = 1e-6  # at step 0, rises linearly
    config.optimizer.min_learning_rate = (
        1e-5  # at the end; cosine and linear keep it in the cool-down
    )
    config.optimizer.warmup_epochs = 5
    config.optimizer.cooldown_epochs = 10
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.momentum = 0.9  # of sgd and muon; the others have beta1
    config.optimizer.weight_decay = 0.05  # of kernels and relative positions; times learning rate
    config.optimizer.clip_norm = 0.0  # global gradient norm; 0 disables clipping
    config.optimizer.layer_decay = 1.0  # layer-wise learning-rate decay factor; 1 disables
    config.optimizer.freeze = ""  # regex of names such as "blocks/3/inner/fc1/kernel"

    config.ema = ConfigDict()
    config.ema.decay = 0.99996  # per step; 0 disables the EMA
    config.ema.warmup = False  # limit the decay to 1 - (step + 1)^(-2/3), as timm's ModelEmaV3

    config.eval = ConfigDict()
    config.eval.every = "1 epochs"  # and after the last step
    config.eval.batch_size = 1024
    config.eval.weights = "ema"  # or "raw": the weights that are evaluated and ranked
    config.eval.patience = 0  # stop after so many evaluations without a new best; 0 disables
    # Only for tnt-flax eval:
    config.eval.classes = ""  # restrict to "imagenet-a", "imagenet-r" or a file's classes; "" all
    config.eval.real_labels = ""  # ReaL's real.json, in data.root; replaces the labels

    config.checkpoint = ConfigDict()
    config.checkpoint.every = "1 epochs"  # and at every evaluation
    config.checkpoint.keep = 3  # latest checkpoints to keep, besides the best
    config.checkpoint.best = "top1"  # or "mean_per_class", "top5"; "loss" and "ece": the lowest
    # For images of several classes "mean_average_precision" replaces "mean_per_class".

    config.log = ConfigDict()
    config.log.every = "50 steps"
    config.log.trackers = ""  # beside TensorBoard: "wandb", "mlflow", "trackio", or "wandb,mlflow"
    config.log.project = "tnt_flax"  # name of the project (MLflow: experiment) of the trackers
    return config.lock()


def check_argument(file: str, argument: str, choices: Iterable[str]) -> None:
    """Raises InputError unless `argument`, as in --config=FILE:ARGUMENT, is one of `choices`."""
    if argument not in choices:
        raise InputError(
            f"configs/{file}:{argument}: the argument after the colon must be one of "
            f"{', '.join(choices)}"
        )

# SPDX-License-Identifier: Apache-2.0
"""The schema: every key there is, its default, and one line on what it means.

The defaults are the published TNT-S recipe. The other files import this one and change values.
Any key can be set on the command line: --config.batch_size=256 --config.data.root=/data/imagenet
Durations are "N epochs" or "N steps".
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 42  # of the initial weights, the data order, augmentation and dropout
    config.epochs = 300  # of warm-up and cosine; optimizer.cooldown_epochs come after them
    config.batch_size = 1024  # images per step, over all devices and hosts

    config.stall_minutes = 30.0  # without a finished step or batch: show the stacks, end; 0 is off

    config.init_from = ""  # weights of any system to begin with: a file, workdir, or hf:// address

    # The axes along which all devices stand; a resumed run may have others, and rounds otherwise.
    config.mesh = ConfigDict()
    config.mesh.data = -1  # splits the batch; -1 takes all devices that the others leave
    config.mesh.fsdp = 1  # splits the batch, and weights, average and optimizer state (ZeRO)
    config.mesh.tensor = 1  # splits the heads and the MLP of the outer transformer
    config.mesh.gradient_dtype = "float32"  # in which devices exchange gradients; or "bfloat16"

    config.model = ConfigDict()
    config.model.name = "tnt_s_patch16_224"  # of tnt_flax.list_models(); "" is that of the weights
    config.model.drop_path = 0.1  # of the last block, linear from 0 in the first
    config.model.dropout = 0.0  # of positions, attention outputs and MLPs
    config.model.attention_dropout = 0.0
    config.model.dtype = "bfloat16"  # of the computation; weights, norms and softmax are float32
    # Implementations with equal results: "reference", "cpu" and, of TNT, "pallas" (TPU, opt-in).
    config.model.inner_impl = "auto"  # of the inner transformer; of TNT also "lanes"
    config.model.outer_impl = "auto"  # of the outer transformer
    config.model.remat = "auto"  # computed twice to save memory: "none", "inner", "block"
    # These come from the name unless set.
    config.model.depth = config_dict.placeholder(int)  # blocks
    config.model.depths = config_dict.placeholder(tuple)  # of PyramidTNT: blocks of its four stages
    config.model.outer_dim = config_dict.placeholder(int)  # width of a sentence
    config.model.inner_dim = config_dict.placeholder(int)  # width of a word
    config.model.outer_heads = config_dict.placeholder(int)
    config.model.inner_heads = config_dict.placeholder(int)
    config.model.patch_size = config_dict.placeholder(int)  # pixels, each side of a sentence
    config.model.inner_stride = config_dict.placeholder(int)  # pixels from word to word
    config.model.mlp_ratio = config_dict.placeholder(float)
    config.model.se = config_dict.placeholder(bool)  # squeeze-excite (paper Table 12)
    config.model.vanilla_blocks = config_dict.placeholder(tuple)  # without words (paper Table 5)

    config.data = ConfigDict()
    config.data.source = "folder"  # "imagenet_tars", "webdataset", "tfds" or "digits" (embedded)
    config.data.root = ""  # folder or gs:// address; the data_dir of tfds ("" is tfds's default)
    config.data.name = ""  # of the tfds data set, such as "cifar10" or "imagenet2012:5.1.0"
    config.data.train_split = "train"  # of webdataset also "PREFIX-{000000..000146}.tar", "*.tar"
    config.data.eval_split = "validation"  # folders and shards may also call it "val"
    config.data.holdout = 0.0  # share of a folder to evaluate on where it has no eval_split
    config.data.class_list = ""  # file with one class a line; "" sorts what is found naturally
    config.data.eval_labels = ""  # of imagenet_tars; "" finds the devkit or a list beside the tars
    config.data.image_size = 224  # pixels, each side
    config.data.crop_fraction = 0.9  # evaluation resizes to image_size / crop_fraction, then crops
    config.data.mean = (0.5, 0.5, 0.5)  # per channel, on the scale 0..1
    config.data.std = (0.5, 0.5, 0.5)
    config.data.corrupt = "error"  # "skip" replaces unreadable images by their neighbours, counted
    config.data.threads = 8  # per host, for decoding and augmenting
    config.data.workers = 0  # processes per host to spread that over; 0 stays in this one

    config.data.retry_seconds = 120.0  # to go on trying where the storage fails, not an image

    config.augment = ConfigDict()
    config.augment.scale = (0.08, 1.0)  # area of the random resized crop, as a share of the image
    config.augment.ratio = (3 / 4, 4 / 3)  # its aspect ratio
    config.augment.resampling = "pillow"  # timm's pixels; "opencv" is faster, some levels off
    config.augment.flip = 0.5  # probability of a horizontal flip
    config.augment.randaugment = "rand-m9-mstd0.5-inc1"  # as timm spells it; "" is off
    config.augment.color_jitter = 0.4  # of brightness, contrast, saturation; not with randaugment
    config.augment.repeats = 3  # views of each image shown, a third of all per epoch; 1 is off
    config.augment.label_smoothing = 0.1
    config.augment.mixup_alpha = 0.8  # mixup's weight is Beta(alpha, alpha); 0 leaves mixup out
    config.augment.cutmix_alpha = 1.0  # likewise of cutmix; with both 0 nothing is mixed
    config.augment.mix_prob = 1.0  # probability that a group of images is mixed
    config.augment.mix_switch_prob = 0.5  # probability that it is by cutmix and not by mixup
    config.augment.mix_groups = 8  # of consecutive rows of the batch, each with its own draw
    config.augment.erase_prob = 0.25  # probability of erasing a box of an image, after mixing
    config.augment.erase_area = (0.02, 1 / 3)  # area of the box, as a share of the image
    config.augment.erase_ratio = (0.3, 1 / 0.3)  # its aspect ratio

    config.optimizer = ConfigDict()  # AdamW
    config.optimizer.learning_rate = 1e-3  # used as it is: not scaled by the batch size
    config.optimizer.warmup_learning_rate = 1e-6  # of the first epoch
    config.optimizer.min_learning_rate = 1e-5  # at the end of the cosine and in the cool-down
    config.optimizer.warmup_epochs = 5
    config.optimizer.cooldown_epochs = 10
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.05  # of kernels; multiplied by the learning rate
    config.optimizer.clip_norm = 0.0  # of the whole gradient; 0 does not clip
    config.optimizer.layer_decay = 1.0  # learning rate of each layer to that of the next; 1 is off
    config.optimizer.freeze = ""  # regular expression: parameters with such a name do not learn

    config.ema = ConfigDict()
    config.ema.decay = 0.99996  # per step, from the first step on; 0 tracks the weights themselves

    config.eval = ConfigDict()
    config.eval.every = "1 epochs"  # during training, and after the last step
    config.eval.batch_size = 1024
    config.eval.weights = "ema"  # or "raw"; also decides which checkpoint is the best

    # Of --mode=eval alone:
    config.eval.classes = ""  # the only answers: "imagenet-a", "imagenet-r", a file of names; all
    config.eval.real_labels = ""  # ReaL's real.json, beside the data, in place of the labels

    config.checkpoint = ConfigDict()
    config.checkpoint.every = "1 epochs"  # besides one with every evaluation
    config.checkpoint.keep = 3  # the latest ones; the best one is always kept

    config.log = ConfigDict()
    config.log.every = "50 steps"
    return config.lock()

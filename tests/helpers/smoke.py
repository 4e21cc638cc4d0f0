# SPDX-License-Identifier: Apache-2.0
# The smallest run that still does everything: 29 steps an epoch on the digits.
SMOKE = {
    "epochs": 1,
    "batch_size": 48,
    "model.depth": 1,
    "model.outer_dim": 24,
    "model.inner_dim": 4,
    "model.inner_heads": 2,
    "optimizer.warmup_epochs": 0,
    "optimizer.cooldown_epochs": 0,
    "eval.every": "1 epochs",
    "checkpoint.every": "10 steps",
    "log.every": "10 steps",
}

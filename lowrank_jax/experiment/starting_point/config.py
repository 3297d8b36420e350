"""A small network on coloured shapes, its kernels factored by kernel projection at a quarter of full rank."""

from lowrank_jax.config import default


def get_config():
    config = default()
    config.batch_size = 32
    config.epochs = 5
    config.dataset.name = "data.py:splits"  # or a folder of images: "folder:PATH"
    config.model.name = "model.py:Net"
    config.model.kwargs = {"width": 32}
    config.objective.metrics = ("top1",)
    config.optim.lr = 0.1
    config.optim.warmup = "1 epoch"
    config.lowrank.scale = 0.25  # of full rank; lowrank.method = "none" is the dense network
    config.lowrank.rules = ({"path": "(stem|head)/kernel", "method": "none"},)  # the first match wins
    return config.lock()

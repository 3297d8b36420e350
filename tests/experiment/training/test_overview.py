from lowrank_jax.experiment.training.overview import overview
from tests import running


def rows(text, start):
    """The cells of the lines that begin so."""
    return [line.split("  ") for line in text.splitlines() if line.startswith(start)]


def cells(text, start):
    (row,) = rows(text, start)
    return [cell.strip() for cell in row if cell]


def test_every_device_holds_its_part():
    text = overview(running.config(mesh__data=2, mesh__fsdp=4, optim__ema_decay=0.9), 8)
    # 64 pixels, 32 units, a quarter of the full rank of 32.
    assert cells(text, "dense1/kernel/u") == ["dense1/kernel/u", "64x8", "fsdp, -", "16x8", "512"]
    assert cells(text, "dense2/kernel/v") == ["dense2/kernel/v", "8x32", "-, fsdp", "8x8", "256"]
    # The head's bias; scales and biases of two norms.
    assert cells(text, "(others)") == ["(others)", "whole", str(4 * (10 + 4 * 32))]
    assert cells(text, "mesh")[0] == "mesh data 2 x fsdp 4 x model 1"
    # The head's rank is 3, for a quarter of 10; its v has ten columns, which four do not divide.
    cut, whole = 64 * 8 + 8 * 32 + 32 * 8 + 8 * 32 + 32 * 3, 3 * 10 + 10 + 4 * 32
    assert cells(text, "parameters")[1:] == [f"{4 * (cut / 4 + whole) / 1000:.3g}kB", f"{4 * (cut + whole) / 1000:.3g}kB"]
    # Averages and momentum besides; means and variances of two norms and their averages, step and count.
    a_device, in_all = 3 * (cut / 4 + whole) + 2 * 4 * 32 + 2, 3 * (cut + whole) + 2 * 4 * 32 + 2
    assert cells(text, "state")[1:] == [f"{4 * a_device / 1000:.3g}kB", f"{4 * in_all / 1000:.3g}kB"]


def test_without_devices_it_is_of_the_fewest():
    assert running.config(mesh__fsdp=2, mesh__model=2).mesh.least_devices == 4


def test_a_mesh_that_cuts_nothing_needs_no_second_table():
    text = overview(running.config(), 8)
    assert not rows(text, "dense1/kernel/u") and len(rows(text, "dense1/kernel")) == 1
    assert len(set(cells(text, "state")[1:])) == 1


def test_more_devices_than_there_are_can_be_shown():
    config = running.config(mesh__data=4, mesh__model=2)
    assert "mesh data 4 x fsdp 1 x model 2" in overview(config, 8)
    many = running.parsed(devices=512, batch_size=1024, eval__batch_size=1024, mesh__fsdp=16, mesh__model=2)
    assert cells(overview(many, 512), "dense1/kernel/u")[1:4] == ["64x8", "model*fsdp, -", "2x8"]

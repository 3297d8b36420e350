"""Photographs out of software packages: real pictures where no data set of labelled images can be downloaded.

`python -m scripts.pictures --out=FOLDER` makes crops of them, in three sets that share no picture and no scene.  `load` reads
them, and `bootstrap` gives the interval of what was measured on them.
"""

from scripts.pictures.intervals import bootstrap
from scripts.pictures.stored import Pictures, load

__all__ = ["Pictures", "bootstrap", "load"]

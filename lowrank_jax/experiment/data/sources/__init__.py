"""Where data sets come from: a module for each kind of source."""

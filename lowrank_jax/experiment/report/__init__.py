"""Reports: what finished runs say, on one page."""

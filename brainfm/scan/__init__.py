"""Scans: read from any format, brought to an input contract's grid, held against what the contract says."""

from brainfm.scan.load import Scan, ScanLike, load_scan
from brainfm.scan.read import ImageLike

__all__ = ["ImageLike", "Scan", "ScanLike", "load_scan"]

"""What an exported file costs to run on this machine: latency, load time, memory; beside other files, and layer by layer."""

from vitq.bench.baselines import BASELINES, export_float, write_baselines
from vitq.bench.compare import Row, compare
from vitq.bench.footprint import Footprint, footprint
from vitq.bench.latency import Latency, latencies

__all__ = ["BASELINES", "Footprint", "Latency", "Row", "compare", "export_float", "footprint", "latencies", "write_baselines"]

from vitq.accuracy import Evaluation as Evaluation
from vitq.accuracy import evaluate as evaluate
from vitq.accuracy import onnx_runnable as onnx_runnable
from vitq.allocation import Allocation as Allocation
from vitq.allocation import allocate as allocate
from vitq.artifacts import BitPlan as BitPlan
from vitq.artifacts import Profile as Profile
from vitq.artifacts import load_plan as load_plan
from vitq.artifacts import load_profile as load_profile
from vitq.artifacts import save as save_artifact
from vitq.calibration import calibrate as calibrate
from vitq.checkpoint import Checkpoint as Checkpoint
from vitq.checkpoint import load as load_checkpoint
from vitq.checkpoint import save as save_checkpoint
from vitq.errors import VitqError as VitqError
from vitq.images import Images as Images
from vitq.images import open_images as open_images
from vitq.importance import profile as profile
from vitq.models import LoadedModel as LoadedModel
from vitq.models import load as load
from vitq.onnx_file import ExportReport as ExportReport
from vitq.onnx_file import export as export

__all__ = [
    "Allocation",
    "BitPlan",
    "Checkpoint",
    "Evaluation",
    "ExportReport",
    "Images",
    "LoadedModel",
    "Profile",
    "VitqError",
    "__version__",
    "allocate",
    "calibrate",
    "evaluate",
    "export",
    "load",
    "load_checkpoint",
    "load_plan",
    "load_profile",
    "onnx_runnable",
    "open_images",
    "profile",
    "save_artifact",
    "save_checkpoint",
]

__version__: str

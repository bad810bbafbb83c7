"""Files ↔ arrays.

arrays              `load_arrays`, `save_arrays`: .npy, .npz and .safetensors files
checkpoint          `open_checkpoint`: arrays of a file or folder, read when used
sources             which arrays a path holds, in any of the formats
stored_arrays       arrays that are read on use, and those of safetensors files
numpy_arrays        those of .npy and .npz files
orbax_arrays        leaves of Orbax checkpoints
float_weights       weights in floating point, and scales of the ones in fp8
members             members of an archive, stored or compressed
peft                `save_peft`, `load_peft`: adapters in PEFT's files
peft_reader         `read_peft`: everything that such an adapter holds
peft_config         their configuration, ranks and scales
peft_keys           the names of their tensors
adapter_formats     `load_adapter`: factors in the formats of several programs
adapter_names       the names of their tensors
kohya_modules       the modules that kohya's flattened names stand for
diffusers_scales    the scales that the metadata of diffusers says
qwix_factors        factors of qwix as matrices
experts             factors of stacked experts
adapter_files       the two files of an adapter
adapter_jobs        `resize_adapter`, `combine_adapters`
extract_jobs        `extract_checkpoint`: the difference of two checkpoints
init_jobs           `initialize_checkpoint`: first factors, and a base that moved
init_report         what these factors hold
adapter_ranks       ranks of modules, and a report of what they keep
merge_jobs          `merge_checkpoint`: a model folder with adapters merged in
merge_plan          which tensors each file of the merged model holds
merge_blocks        changed tensors, some rows at a time
changes             what adapters change in the tensors of a checkpoint
tied                models whose head is their embedding
architectures       what model families call their weights
output_folder       a folder that appears whole
folders             which files of a folder hold which arrays
safetensors_header  where the tensors of a safetensors file lie
safetensors         the dtypes of the format, and its writer
numpy_files         headers of NumPy's formats, read without trust, and writers
json_files          JSON files, read without trust
files               files that are written completely or not at all
"""

from jlora.checkpoints.adapter_formats import load_adapter
from jlora.checkpoints.adapter_jobs import combine_adapters, resize_adapter
from jlora.checkpoints.adapter_ranks import AdapterReport, ModuleReport
from jlora.checkpoints.arrays import load_arrays, save_arrays
from jlora.checkpoints.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from jlora.checkpoints.extract_jobs import extract_checkpoint
from jlora.checkpoints.init_jobs import initialize_checkpoint
from jlora.checkpoints.merge_jobs import MergeReport, merge_checkpoint
from jlora.checkpoints.peft import load_peft, save_peft
from jlora.checkpoints.peft_reader import PeftAdapter, read_peft

__all__ = [
    "AdapterReport",
    "Checkpoint",
    "MergeReport",
    "ModuleReport",
    "PeftAdapter",
    "TensorInfo",
    "combine_adapters",
    "extract_checkpoint",
    "initialize_checkpoint",
    "load_adapter",
    "load_arrays",
    "load_peft",
    "merge_checkpoint",
    "open_checkpoint",
    "read_peft",
    "resize_adapter",
    "save_arrays",
    "save_peft",
]

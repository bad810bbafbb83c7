"""Files ↔ arrays.

Reading and writing arrays:
arrays              `load_arrays`, `save_arrays`: .npy, .npz and .safetensors files
checkpoint          `open_checkpoint`: arrays of a file or folder, read when used
sharded_arrays      `load_sharded`: on devices, each process reading its part
host_arrays         arrays of devices on the host; several processes write one file
lazy_tensors        such arrays as leaves of a tree
sources             the choice between the formats
stored_arrays       arrays that are read on use, and safetensors files
slices              blocks of such arrays
numpy_arrays        arrays of .npy and .npz files
orbax_arrays        leaves of Orbax checkpoints
quantized_weights   `load_weights`: quantised weights of several programs
quantized_files     quantised arrays as tensors; bitsandbytes_files: in its scheme
float_weights       weights in floating point, and scales of the ones in fp8
members             members of an archive, stored or compressed
folders             the files of a folder and their arrays
safetensors_header  the places of tensors in a safetensors file
safetensors         the dtypes of the format, and its writer
numpy_files         headers of NumPy's formats, read without trust, and writers
json_files          JSON files, read without trust
files               files that are written completely or not at all

Adapters:
peft                `save_peft`, `load_peft`: adapters in PEFT's files
peft_file           an open adapter, whose factors are read on use
peft_reader         `read_peft`: everything that such an adapter holds
peft_config         their configuration, ranks and scales
peft_keys           the names of their tensors
adapter_formats     `load_adapter`: factors in the formats of several programs
adapter_names       the names of their tensors
kohya_modules       the modules that kohya's flattened names stand for
diffusers_scales    the scales in the metadata of diffusers
qwix_factors        factors of qwix as matrices
experts             factors of stacked experts
adapter_layout      names and shapes of an adapter's tensors
adapter_files       the two files of an adapter

Jobs, each a public function and a command:
extract_jobs        `extract_checkpoint`; differences: its decompositions
init_jobs           `initialize_checkpoint`; init_run: its steps
initial_factors     its factors; initial_bases: its bases
merge_jobs          `merge_checkpoint`; merge_plan, merge_blocks, changes, tied: parts
adapter_jobs        `resize_adapter`, `combine_adapters`; adapter_sums: their factors
modules             the weights of a checkpoint as modules
architectures       names and layouts of the weights of model families
saved_parameters    whole parameters beside factors
window_store        arrays of a job on disk, until its result is written
factor_store        singular triplets there
adapter_ranks       ranks of modules, and a report of their energies
pipelines           reading ahead and writing behind
memory              the limit of memory of a job
output_folder       a folder that appears whole
shared_output       such a folder, written by several processes
shared_jobs         who writes which part of it; locks: whether others are at work
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
from jlora.checkpoints.quantized_weights import load_weights
from jlora.checkpoints.sharded_arrays import load_sharded

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
    "load_sharded",
    "load_weights",
    "merge_checkpoint",
    "open_checkpoint",
    "read_peft",
    "resize_adapter",
    "save_arrays",
    "save_peft",
]

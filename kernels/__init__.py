"""lorax's Triton kernels, imported as `lorax.kernels`: one kernel family a file.

They need torch and triton alone. The folder stands at the top of the repository because kernels are
read, tuned and benchmarked on their own.

transformers and bitsandbytes look for a package called `kernels`; run from this repository they
find this folder. The version below tells them that it is not theirs.
"""

__version__ = "0.0.0"

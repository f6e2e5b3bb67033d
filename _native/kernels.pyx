# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The compiled twins of flashinfer/kernels/, one file a subject, in one module.

One module, as what Cython makes of arrays is a large part of the build and would be compiled once
for each.
"""

include "doors.pxi"
include "sparse_matmul.pxi"
include "attention.pxi"
include "neuron_cache.pxi"
include "direct_io.pxi"

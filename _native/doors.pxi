# What every compiled kernel shares: argument checks, made before a pointer is touched.
#
# A check here only says no; the message is that of flashinfer/kernels/doors.py, which checks the
# same and is called where one of these has refused.

import numpy as np

from cpython.number cimport PyNumber_Index
from libc.stdint cimport int32_t, int64_t, uint8_t

cdef object ndarray = np.ndarray
cdef object FLOAT32 = np.dtype(np.float32), FLOAT16 = np.dtype(np.float16)
cdef object FLOAT64 = np.dtype(np.float64), UINT8 = np.dtype(np.uint8)
cdef object INT32 = np.dtype(np.int32), INT64 = np.dtype(np.int64)
cdef int64_t MOST = (<int64_t>1) << 62

cdef enum:
    MOST_THREADS = 1024

cdef double LEAST_CAP = 1e-3, MOST_CAP = 1e3  # those of formats/layers/attention.py
cdef double LARGEST = np.finfo(np.float32).max
cdef tuple NUMBERS = (float, int, np.floating, np.integer)
REFUSALS = (ValueError, TypeError, AttributeError, OverflowError, BufferError)


class Refused(ValueError):
    """An argument does not fit; the kernel's door says which."""


def explained(kernel, *arguments):
    """Raise what the kernel's door says of these arguments."""
    from flashinfer.kernels import doors

    getattr(doors, kernel)(*arguments)


cdef int check_array(value, dtype, int dimensions) except -1:
    """An aligned array of this dtype; what a memoryview is taken of also checks the rest."""
    if not isinstance(value, ndarray) or value.dtype != dtype or value.ndim != dimensions:
        raise Refused()
    if not value.flags.aligned:
        raise Refused()
    return 0


cdef const float[::1] floats(value):
    check_array(value, FLOAT32, 1)
    return value


cdef const float[::1] maybe_floats(value):
    if value is None:
        return None
    return floats(value)


cdef const float[:, ::1] floats_2d(value):
    check_array(value, FLOAT32, 2)
    return value


cdef const float[:, :, ::1] floats_3d(value):
    check_array(value, FLOAT32, 3)
    return value


cdef const int32_t[::1] int32s(value):
    check_array(value, INT32, 1)
    return value


cdef const int32_t[::1] maybe_int32s(value):
    if value is None:
        return None
    return int32s(value)


cdef const int64_t[::1] int64s(value):
    check_array(value, INT64, 1)
    return value


cdef const uint8_t[::1] bytes_1d(value):
    check_array(value, UINT8, 1)
    return value


cdef int64_t whole(value, int64_t low, int64_t high) except? -1:
    """A whole number from ``low`` to ``high``."""
    if isinstance(value, bool):
        raise Refused()
    cdef int64_t number = PyNumber_Index(value)
    if not low <= number <= high:
        raise Refused()
    return number


cdef float number(value, double low) except? -1:
    """A number from ``low`` on that float32 holds."""
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise Refused()
    cdef double number = value
    if not low <= number <= LARGEST:
        raise Refused()
    return <float>number


cdef int switch(value) except -1:
    """True or False."""
    if value is not True and value is not False:
        raise Refused()
    return value


cdef float capped(value) except? -1:
    """A cap c of c tanh(x / c)."""
    cdef float cap = number(value, LEAST_CAP)
    if <double>value > MOST_CAP:
        raise Refused()
    return cap


cdef bint fits(int64_t begin, int64_t length, int64_t size) noexcept:
    """Whether a range lies within ``size`` bytes."""
    return begin >= 0 and length >= 0 and begin <= size and length <= size - begin


cdef struct Extent:
    const char *begin
    int64_t size  # bytes


cdef Extent extent(const void *begin, int64_t size) noexcept:
    return Extent(<const char *>begin, size)


cdef int check_apart(const Extent *arrays, int n_written, int n) except -1:
    """The first ``n_written`` arrays share no memory with each other, nor with the rest."""
    cdef int i, k
    for i in range(n_written):
        for k in range(i + 1, n):
            if (arrays[i].size and arrays[k].size
                    and arrays[i].begin < arrays[k].begin + arrays[k].size
                    and arrays[k].begin < arrays[i].begin + arrays[i].size):
                raise Refused()
    return 0

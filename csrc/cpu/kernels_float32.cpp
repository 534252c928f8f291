// The kernels of float32.

#include "kernels.h"

extern "C" const void* float32_kernels(int vectors, int groups) { return &compiled<Singles, float>(vectors, groups); }

// The kernels of bfloat16.

#include "kernels.h"

extern "C" const void* bfloat16_kernels(int vectors, int groups) { return &compiled<Pairs, Bf16>(vectors, groups); }

// The calls of CUDA's runtime that csrc/extension/bindings.cpp makes, in the place of CUDA's header: each is noted, and
// nothing is launched. A device that there is not is an error.
#pragma once

#include <string>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline std::string noted;
inline const char* noted_calls() { return noted.c_str(); }

inline cudaError_t cudaSetDevice(int device) {
    noted += "device " + std::to_string(device) + "\n";
    return device < 2 ? cudaSuccess : cudaErrorInvalidDevice;
}

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
    noted += "shared " + std::to_string(value) + "\n";
    return cudaSuccess;
}

inline cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 threads, void** arguments, std::size_t shared,
                                    cudaStream_t stream) {
    noted += "launch " + std::to_string(grid.x) + " " + std::to_string(grid.y) + " " + std::to_string(threads.x) + " " +
             std::to_string(shared) + " " + std::to_string(reinterpret_cast<std::size_t>(stream)) + " " +
             std::to_string(*static_cast<int*>(arguments[1])) + "\n";
    return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidDevice"; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid device ordinal"; }

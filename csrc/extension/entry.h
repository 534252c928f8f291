// A kernel that is compiled into the extension module: its name, its address on the host, how many arguments it takes.
#pragma once

#include <cstddef>
#include <vector>

struct Kernel {
    const char* name;
    const void* function;
    std::size_t arguments;
};

template <class... Arguments>
Kernel entry(const char* name, void (*kernel)(Arguments...)) {
    return {name, reinterpret_cast<const void*>(kernel), sizeof...(Arguments)};
}

std::vector<Kernel> all_kernels();

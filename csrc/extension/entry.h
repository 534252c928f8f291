// A kernel that is compiled into the extension module: its name, its address on the host, and what it takes.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

struct Kernel {
    const char* name;
    const void* function;
    std::string arguments;  // a letter for each: 'p' a pointer, 'i' an int, 'f' a float
};

using Kernels = std::vector<Kernel>;

template <class Argument>
constexpr char letter() {
    static_assert(std::is_pointer_v<Argument> || std::is_same_v<Argument, int> || std::is_same_v<Argument, float>);
    return std::is_pointer_v<Argument> ? 'p' : std::is_same_v<Argument, int> ? 'i' : 'f';
}

template <class... Arguments>
Kernel entry(const char* name, void (*kernel)(Arguments...)) {
    return {name, reinterpret_cast<const void*>(kernel), {letter<Arguments>()...}};
}

Kernels all_kernels();

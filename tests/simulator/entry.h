// How the engine enters a kernel: its arguments are an array of addresses, as a driver takes them.
#pragma once

template <int... I>
struct Indices {};

template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};

template <int... I>
struct MakeIndices<0, I...> {
    using Type = Indices<I...>;
};

template <class... Arguments, int... I>
void enter(void (*kernel)(Arguments...), void** arguments, Indices<I...>) {
    kernel(*static_cast<Arguments*>(arguments[I])...);
}

template <class... Arguments>
void enter(void (*kernel)(Arguments...), void** arguments) {
    enter(kernel, arguments, typename MakeIndices<sizeof...(Arguments)>::Type{});
}

// The argument's size in bytes, so that a launch with others is refused.
template <class... Arguments>
int sizes_of(void (*)(Arguments...), int* sizes) {
    int const found[] = {static_cast<int>(sizeof(Arguments))...};
    for (unsigned i = 0; i < sizeof...(Arguments); ++i) sizes[i] = found[i];
    return sizeof...(Arguments);
}

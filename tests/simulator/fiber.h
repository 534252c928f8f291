// Contexts that a thread switches between: a stack and the registers that a call preserves.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__x86_64__)

extern "C" void simulator_switch(void** from, void* to);

asm(R"(
.text
.globl simulator_switch
.type simulator_switch, @function
simulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simulator_switch, .-simulator_switch
)");

struct Context {
    void* stack_pointer = nullptr;

    void start(char* stack, size_t size, void (*function)()) {
        auto top = reinterpret_cast<uintptr_t*>((reinterpret_cast<uintptr_t>(stack) + size) & ~uintptr_t(15));
        *--top = 0;                                      // where `function` would return to: it never does
        *--top = reinterpret_cast<uintptr_t>(function);  // what the first switch returns to
        for (int i = 0; i < 6; ++i) *--top = 0;
        stack_pointer = top;
    }
};

inline void switch_context(Context& from, Context& to) { simulator_switch(&from.stack_pointer, to.stack_pointer); }

#else

#include <ucontext.h>

struct Context {
    ucontext_t context;

    void start(char* stack, size_t size, void (*function)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = size;
        context.uc_link = nullptr;
        makecontext(&context, function, 0);
    }
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

#endif

// Memory of which only what is used takes room.
inline char* new_stacks(size_t bytes) {
    void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) abort();
    return static_cast<char*>(found);
}

// A CUDA device that has memory and no arithmetic. The library is put in front of torch's CUDA build by LD_PRELOAD and
// answers what torch, Triton and Megatron-Core ask of the CUDA runtime, the driver, cuBLAS and NCCL.
//
// Memory is address space that no kernel touches, so 140 GiB cost nothing. Copies between host and device are real up
// to COPIED_BYTES, so that a value which the host sent comes back when it is read. Kernels, matrix products and
// collectives are counted, by name and size, and compute nothing. Functions whose answer is "success" and nothing else
// are not in these files: build.py generates them.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#define API extern "C" __attribute__((visibility("default")))

namespace nullgpu {

enum Kind { UNKNOWN, DEVICE, PINNED, REGISTERED };

// Larger copies only count: weights would touch real memory.
constexpr size_t COPIED_BYTES = 8 << 20;

// Adds one to the count of (kind, name, a, b, c). `name` must live as long as the process.
// Kinds: K launch, G matrix product, N collective, H host to device, D device to host, C within the device, S wait.
void count(char kind, const char *name, long a = 0, long b = 0, long c = 0);
void count_flops(double flops);

void *take(size_t bytes, Kind kind);  // nullptr when the device is full
void drop(void *pointer);
void register_host(void *pointer, size_t bytes);
Kind kind_of(const void *pointer);
uintptr_t base_of(const void *pointer, size_t *bytes);
void copy(void *to, const void *from, size_t bytes);
void forget(const void *pointer);  // a kernel wrote there: its value is not known any more
size_t free_bytes();
size_t capacity();

void broadcast_on(const void *stream);  // may never end: see hang.cpp

int device_count();
int current_device();
bool set_device(int device);
long attribute(int which);  // of the device; the runtime's and the driver's numbers are the same
const char *device_name();

void *handle();  // an opaque object of its own, for streams, events, modules, ...

}  // namespace nullgpu

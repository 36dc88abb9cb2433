// The CUDA runtime (libcudart): registration and launch of kernels, the device, memory, streams and events.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "nullgpu.h"

using namespace nullgpu;

namespace {

std::unordered_map<const void *, const char *> &kernel_names() {
    static auto *names = new std::unordered_map<const void *, const char *>;
    return *names;
}

struct Configuration {
    dim3 grid, block;
    size_t shared;
    void *stream;
};
thread_local std::vector<Configuration> configurations;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t launch(const void *kernel) {
    auto it = kernel_names().find(kernel);
    count('K', it == kernel_names().end() ? "?" : it->second);
    return cudaSuccess;
}

cudaError_t wait(const char *how) {
    count('S', how);
    return cudaSuccess;
}

cudaError_t allocate(void **pointer, size_t bytes, Kind kind) {
    *pointer = take(bytes, kind);
    return *pointer ? cudaSuccess : (last_error = cudaErrorMemoryAllocation);
}

template <class T>
cudaError_t answer(T *place, T value) {
    *place = value;
    return cudaSuccess;
}

}  // namespace

// ------------------------------------------------------------------------------------------------ kernels
API void **__cudaRegisterFatBinary(void *) { return (void **)handle(); }
API char __cudaInitModule(void **) { return 1; }
API void __cudaRegisterFunction(void **, const char *host, char *, const char *name, int, void *, void *, void *,
                                void *, int *) {
    kernel_names()[host] = name;
}
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    configurations.push_back({grid, block, shared, stream});
    return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    Configuration top = configurations.back();
    configurations.pop_back();
    *grid = top.grid, *block = top.block, *shared = top.shared, *(void **)stream = top.stream;
    return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) { return answer(kernel, (cudaKernel_t)host); }
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void **, size_t, cudaStream_t) {
    return launch((void *)kernel);
}
API cudaError_t cudaLaunchKernel(const void *kernel, dim3, dim3, void **, size_t, cudaStream_t) {
    return launch(kernel);
}
API cudaError_t cudaLaunchCooperativeKernel(const void *kernel, dim3, dim3, void **, size_t, cudaStream_t) {
    return launch(kernel);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *, const void *kernel, void **) { return launch(kernel); }
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *said, const void *) {
    memset(said, 0, sizeof *said);
    said->maxThreadsPerBlock = 1024;
    said->numRegs = 64;
    said->ptxVersion = said->binaryVersion = 90;
    said->maxDynamicSharedSizeBytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *, int, size_t, unsigned) {
    return answer(n, 2);
}
API cudaError_t cudaOccupancyMaxActiveClusters(int *n, const void *, const cudaLaunchConfig_t *) {
    return answer(n, 16);
}
API cudaError_t cudaOccupancyMaxPotentialClusterSize(int *n, const void *, const cudaLaunchConfig_t *) {
    return answer(n, 8);
}
API cudaError_t cudaGetSymbolAddress(void **pointer, const void *) {
    static void *area = take(1 << 20, DEVICE);
    return answer(pointer, area);
}

// ------------------------------------------------------------------------------------------------ device
API cudaError_t cudaGetDeviceCount(int *n) { return answer(n, device_count()); }
API cudaError_t cudaGetDevice(int *device) { return answer(device, current_device()); }
API cudaError_t cudaSetDevice(int device) { return set_device(device) ? cudaSuccess : cudaErrorInvalidDevice; }
API cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr which, int) {
    return answer(value, (int)attribute(which));
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp *said, int device) {
    memset(said, 0, sizeof *said);
    strncpy(said->name, device_name(), sizeof said->name - 1);
    said->uuid.bytes[0] = 1 + device;
    said->pciBusID = device;
    said->totalGlobalMem = capacity();
    said->totalConstMem = 65536;
    said->memPitch = 2147483647;
    said->textureAlignment = 512;
    said->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    said->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    said->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    said->regsPerBlock = said->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerBlock);
    said->warpSize = attribute(cudaDevAttrWarpSize);
    said->maxThreadsPerBlock = said->maxThreadsDim[0] = said->maxThreadsDim[1] = 1024;
    said->maxThreadsDim[2] = 64;
    said->maxGridSize[0] = attribute(cudaDevAttrMaxGridDimX);
    said->maxGridSize[1] = said->maxGridSize[2] = attribute(cudaDevAttrMaxGridDimY);
    said->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    said->maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
    said->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
    said->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
    said->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
    said->major = attribute(cudaDevAttrComputeCapabilityMajor);
    said->unifiedAddressing = said->concurrentKernels = said->cooperativeLaunch = 1;
    said->managedMemory = said->memoryPoolsSupported = 1;
    return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) { return answer(can, 1); }
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    return answer(greatest, -5);
}
API cudaError_t cudaDeviceGetPCIBusId(char *text, int bytes, int device) {
    snprintf(text, bytes, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int *version) { return answer(version, 13000); }
API cudaError_t cudaRuntimeGetVersion(int *version) { return answer(version, 13000); }
API const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaErrorMemoryAllocation ? "out of memory" : "an error of the null GPU";
}
API const char *cudaGetErrorName(cudaError_t e) {
    return e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown";
}
API cudaError_t cudaGetLastError() {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
API cudaError_t cudaPeekAtLastError() { return last_error; }
API cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult *result) {
    static void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    std::string name(symbol);
    for (auto &spelling : {name, name + "_v2"})
        if ((*function = dlsym(driver, spelling.c_str()))) break;
    if (!*function) *function = dlsym(driver, "nullgpu_success");
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------ memory
API cudaError_t cudaMalloc(void **pointer, size_t bytes) { return allocate(pointer, bytes, DEVICE); }
API cudaError_t cudaMallocAsync(void **pointer, size_t bytes, cudaStream_t) { return cudaMalloc(pointer, bytes); }
API cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned) { return allocate(pointer, bytes, PINNED); }
API cudaError_t cudaMallocHost(void **pointer, size_t bytes) { return cudaHostAlloc(pointer, bytes, 0); }
API cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned) {
    register_host(pointer, bytes);
    return cudaSuccess;
}
API cudaError_t cudaFree(void *pointer) { return drop(pointer), cudaSuccess; }
API cudaError_t cudaFreeAsync(void *pointer, cudaStream_t) { return cudaFree(pointer); }
API cudaError_t cudaFreeHost(void *pointer) { return cudaFree(pointer); }
API cudaError_t cudaHostUnregister(void *pointer) { return cudaFree(pointer); }
API cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *total = capacity();
    return answer(free, free_bytes());
}
API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    return copy(to, from, bytes), cudaSuccess;
}
API cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind) {
    copy(to, from, bytes);
    return wait("cudaMemcpy");
}
API cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t bytes, cudaStream_t) {
    return copy(to, from, bytes), cudaSuccess;
}
API cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                                  size_t height, cudaMemcpyKind, cudaStream_t) {
    for (size_t row = 0; row < height; row++)
        copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return cudaSuccess;
}
API cudaError_t cudaMemset(void *pointer, int, size_t) { return forget(pointer), wait("cudaMemset"); }
API cudaError_t cudaMemsetAsync(void *pointer, int, size_t, cudaStream_t) { return forget(pointer), cudaSuccess; }
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *said, const void *pointer) {
    Kind kind = kind_of(pointer);
    memset(said, 0, sizeof *said);
    said->type = kind == DEVICE ? cudaMemoryTypeDevice : kind ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    said->device = current_device();
    said->devicePointer = kind ? (void *)pointer : nullptr;
    said->hostPointer = kind > DEVICE ? (void *)pointer : nullptr;
    return cudaSuccess;
}
// A handle holds the address: it is opened by this process only.
API cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *made, void *pointer) {
    memset(made, 0, sizeof *made);
    memcpy(made, &pointer, sizeof pointer);
    return cudaSuccess;
}
API cudaError_t cudaIpcOpenMemHandle(void **pointer, cudaIpcMemHandle_t made, unsigned) {
    memcpy(pointer, &made, sizeof *pointer);
    return cudaSuccess;
}
API cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t *made, cudaEvent_t) {
    memset(made, 0, sizeof *made);
    return cudaSuccess;
}
API cudaError_t cudaIpcOpenEventHandle(cudaEvent_t *event, cudaIpcEventHandle_t) {
    return answer(event, (cudaEvent_t)handle());
}

// ------------------------------------------------------------------------------------------------ streams, events
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int) {
    return answer(stream, (cudaStream_t)handle());
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    return answer(stream, (cudaStream_t)handle());
}
API cudaError_t cudaStreamCreate(cudaStream_t *stream) { return answer(stream, (cudaStream_t)handle()); }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int *priority) { return answer(priority, 0); }
API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *status) {
    return answer(status, cudaStreamCaptureStatusNone);
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus *status, unsigned long long *,
                                         cudaGraph_t *, const cudaGraphNode_t **, const cudaGraphEdgeData **,
                                         size_t *dependencies) {
    if (dependencies) *dependencies = 0;
    return answer(status, cudaStreamCaptureStatusNone);
}
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void *with, unsigned) {
    call(stream, cudaSuccess, with);
    return cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t call, void *with) { return call(with), cudaSuccess; }
API cudaError_t cudaEventCreate(cudaEvent_t *event) { return answer(event, (cudaEvent_t)handle()); }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) { return cudaEventCreate(event); }
API cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t, cudaEvent_t) {
    return answer(milliseconds, 1.0f);
}
API cudaError_t cudaDeviceSynchronize() { return wait("cudaDeviceSynchronize"); }
API cudaError_t cudaStreamSynchronize(cudaStream_t) { return wait("cudaStreamSynchronize"); }
API cudaError_t cudaEventSynchronize(cudaEvent_t) { return wait("cudaEventSynchronize"); }

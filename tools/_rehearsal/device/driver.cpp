// The CUDA driver (libcuda), which Triton and some of torch call: devices, contexts, modules, launches.
#include <cstdio>
#include <cstring>

#include "nullgpu.h"

using namespace nullgpu;

namespace nullgpu {

long attribute(int which) {
    switch (which) {
        case cudaDevAttrMaxThreadsPerBlock:
        case cudaDevAttrMaxBlockDimX:
        case cudaDevAttrMaxBlockDimY: return 1024;
        case cudaDevAttrMaxBlockDimZ: return 64;
        case cudaDevAttrMaxGridDimX: return 2147483647;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: return 65535;
        case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
        case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrMaxRegistersPerBlock:
        case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
        case cudaDevAttrClockRate: return 1980000;
        case cudaDevAttrMemoryClockRate: return 3201000;
        case cudaDevAttrGlobalMemoryBusWidth: return 6144;
        case cudaDevAttrMultiProcessorCount: return 132;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
        case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
        case cudaDevAttrL2CacheSize: return 62914560;
        case cudaDevAttrComputeCapabilityMajor: return 9;
        case cudaDevAttrUnifiedAddressing:
        case cudaDevAttrConcurrentKernels:
        case cudaDevAttrMemoryPoolsSupported:
        case cudaDevAttrCooperativeLaunch:
        case cudaDevAttrManagedMemory:
        case cudaDevAttrStreamPrioritiesSupported: return 1;
        default: return 0;
    }
}

}  // namespace nullgpu

namespace {

CUcontext context() {
    static auto one = (CUcontext)handle();
    return one;
}

template <class T>
CUresult answer(T *place, T value) {
    *place = value;
    return CUDA_SUCCESS;
}

}  // namespace

API CUresult nullgpu_success(...) { return CUDA_SUCCESS; }

API CUresult cuDriverGetVersion(int *version) { return answer(version, 13000); }
API CUresult cuDeviceGet(CUdevice *device, int ordinal) { return answer(device, (CUdevice)ordinal); }
API CUresult cuDeviceGetCount(int *n) { return answer(n, device_count()); }
API CUresult cuDeviceGetName(char *text, int bytes, CUdevice) {
    snprintf(text, bytes, "%s", device_name());
    return CUDA_SUCCESS;
}
API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice) {
    return answer(value, (int)attribute(which));
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned *flags, int *active) {
    if (flags) *flags = 0;
    return answer(active, 1);
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext *made, CUdevice) { return answer(made, context()); }
API CUresult cuCtxGetCurrent(CUcontext *made) { return answer(made, context()); }
API CUresult cuCtxGetDevice(CUdevice *device) { return answer(device, (CUdevice)current_device()); }
API CUresult cuGetErrorString(CUresult, const char **text) { return answer(text, "an error of the null GPU"); }

// ------------------------------------------------------------------------------------------------ modules, launches
// A function is its name.
API CUresult cuModuleLoadData(CUmodule *made, const void *) { return answer(made, (CUmodule)handle()); }
API CUresult cuModuleLoadDataEx(CUmodule *made, const void *, unsigned, CUjit_option *, void **) {
    return answer(made, (CUmodule)handle());
}
API CUresult cuModuleGetFunction(CUfunction *made, CUmodule, const char *name) {
    return answer(made, (CUfunction)strdup(name));
}
API CUresult cuLibraryLoadData(CUlibrary *made, const void *, CUjit_option *, void **, unsigned, CUlibraryOption *,
                               void **, unsigned) {
    return answer(made, (CUlibrary)handle());
}
API CUresult cuLibraryGetKernel(CUkernel *made, CUlibrary, const char *name) {
    return answer(made, (CUkernel)strdup(name));
}
API CUresult cuKernelGetFunction(CUfunction *made, CUkernel kernel) { return answer(made, (CUfunction)kernel); }
API CUresult cuFuncGetName(const char **name, CUfunction function) { return answer(name, (const char *)function); }
API CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction) {
    bool threads = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
    return answer(value, threads ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0);
}
API CUresult cuLaunchKernel(CUfunction function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                            CUstream, void **, void **) {
    count('K', (const char *)function);
    return CUDA_SUCCESS;
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig *, CUfunction function, void **, void **) {
    count('K', (const char *)function);
    return CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction, const CUlaunchConfig *) { return answer(n, 16); }
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction, int, size_t) { return answer(n, 2); }

// ------------------------------------------------------------------------------------------------ memory
API CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr pointer) {
    Kind kind = kind_of((void *)pointer);
    if (!kind) return CUDA_ERROR_INVALID_VALUE;
    switch (which) {
        case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: return answer((CUdeviceptr *)value, pointer);
        case CU_POINTER_ATTRIBUTE_BUFFER_ID: return answer((unsigned long long *)value, 1ull);
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
            return answer((unsigned *)value, (unsigned)(kind == DEVICE ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST));
        default: return answer((int *)value, 0);
    }
}
API CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *bytes, CUdeviceptr pointer) {
    *base = base_of((void *)pointer, bytes);
    return *base ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
API CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t bytes) {
    *pointer = (CUdeviceptr)take(bytes, DEVICE);
    return *pointer ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
API CUresult cuMemFree_v2(CUdeviceptr pointer) { return drop((void *)pointer), CUDA_SUCCESS; }

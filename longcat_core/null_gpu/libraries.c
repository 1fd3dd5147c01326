/* NVIDIA's libraries and driver, where a plain success is not enough: handles, versions, numbers of results.
   All other functions of theirs return 0, by defaults.c. SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "null_gpu.h"

/* -- driver ------------------------------------------------------------------------------------------------ */

static int success(void) { return 0; }

static void *entry_point(const char *symbol) {
    void *found = dlsym(RTLD_DEFAULT, symbol);
    return found ? found : (void *)success;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned int version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    (void)version, (void)flags;
    *function = entry_point(symbol);
    if (result != NULL) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

int cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *result) {
    (void)version, (void)flags;
    *function = entry_point(symbol);
    if (result != NULL) *result = 0;
    return 0;
}
int cuDevicePrimaryCtxGetState(int index, unsigned int *flags, int *is_active) {
    (void)index;
    *flags = 0;
    *is_active = 1;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int index) {
    (void)index;
    *context = (void *)0x1000;
    return 0;
}
int cuCtxGetCurrent(void **context) { return cuDevicePrimaryCtxRetain(context, 0); }
int cuCtxGetDevice(int *index) { return cudaGetDevice(index); }
int cuDeviceGet(int *handle, int index) {
    *handle = index;
    return 0;
}
int cuDeviceGetCount(int *count) { return cudaGetDeviceCount(count); }
int cuDeviceGetAttribute(int *value, int attribute, int index) {
    return cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, index); /* the same numbers */
}
int cuDriverGetVersion(int *version) { return cudaDriverGetVersion(version); }
int cuGetErrorString(int error, const char **text) {
    (void)error;
    *text = "error of the null GPU";
    return 0;
}
int cuPointerGetAttribute(void *value, int attribute, uintptr_t address) {
    (void)attribute, (void)address;
    *(uint64_t *)value = 0;
    return 0;
}
int cuMemGetAllocationGranularity(size_t *bytes, const void *properties, int option) {
    (void)properties, (void)option;
    *bytes = (size_t)2 << 20;
    return 0;
}

/* A file that `nvcc` of the null GPU has made, with one kernel, which has the name of its folder. */
int cuLibraryLoadFromFile(void **library, const char *path) {
    char name[512];
    const char *end = strrchr(path, '/'), *start = end;
    while (end != NULL && start > path && start[-1] != '/') start--;
    snprintf(name, sizeof name, "%.*s", (int)(end ? end - start : 0), start);
    *library = new_handle();
    name_kernel(*library, name);
    return 0;
}
int cuLibraryGetKernelCount(unsigned int *count, void *library) {
    (void)library;
    *count = 1;
    return 0;
}
int cuLibraryEnumerateKernels(void **kernels, unsigned int count, void *library) {
    if (count > 0) kernels[0] = library;
    return 0;
}
int cuKernelGetFunction(void **function, void *kernel) {
    *function = kernel;
    return 0;
}
int cuLaunchKernelEx(const void *configuration, void *function, void **arguments, void **extra) {
    (void)configuration, (void)arguments, (void)extra;
    count_launch_of(function);
    return 0;
}

/* -- cuBLAS ------------------------------------------------------------------------------------------------ */

int cublasCreate_v2(void **handle) {
    *handle = new_handle();
    return 0;
}
int cublasLtCreate(void **handle) { return cublasCreate_v2(handle); }
int cublasGetMathMode(void *handle, int *mode) {
    (void)handle;
    *mode = 0;
    return 0;
}
int cublasGetPointerMode_v2(void *handle, int *mode) { return cublasGetMathMode(handle, mode); }
size_t cublasLtGetVersion(void) { return 130100; }
int cublasLtMatmulDescCreate(void **description, int compute, int scale) {
    (void)compute, (void)scale;
    return cublasCreate_v2(description);
}
int cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    (void)type, (void)rows, (void)columns, (void)stride;
    return cublasCreate_v2(layout);
}
int cublasLtMatmulPreferenceCreate(void **preference) { return cublasCreate_v2(preference); }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *description, void *a, void *b, void *c, void *d, void *preference, int wanted,
                                   void *results, int *found) {
    (void)handle, (void)description, (void)a, (void)b, (void)c, (void)d, (void)preference, (void)wanted;
    memset(results, 0, 96); /* one cublasLtMatmulHeuristicResult_t: an algorithm of 64 bytes, workspace, state, waves */
    *found = 1;
    return 0;
}

#define PRODUCT(function)              \
    int function(void) {               \
        count_launch(#function);       \
        return 0;                      \
    }
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasHgemm)
PRODUCT(cublasLtMatmul)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemv_v2)

/* -- NCCL -------------------------------------------------------------------------------------------------- */

int ncclGetVersion(int *version) {
    *version = 22907;
    return 0;
}
const char *ncclGetErrorString(int error) {
    (void)error;
    return "error of the null GPU";
}
const char *ncclGetLastError(void *communicator) { return ncclGetErrorString(communicator != NULL); }
int ncclCommInitRank(void **communicator) {
    *communicator = new_handle();
    return 0;
}
int ncclCommInitRankConfig(void **communicator) { return ncclCommInitRank(communicator); }
int ncclCommWindowRegister(void *communicator, void *buffer, size_t bytes, void **window, int flags) {
    (void)communicator, (void)buffer, (void)bytes, (void)flags;
    *window = NULL;
    return 0;
}
PRODUCT(ncclAllGather)
PRODUCT(ncclAllReduce)
PRODUCT(ncclBroadcast)
PRODUCT(ncclRecv)
PRODUCT(ncclReduce)
PRODUCT(ncclReduceScatter)
PRODUCT(ncclSend)

/* -- the others -------------------------------------------------------------------------------------------- */

size_t cudnnGetVersion(void) { return 92000; }
int cudnnCreate(void **handle) { return cublasCreate_v2(handle); }
int cusparseLtInit(void *handle) {
    (void)handle;
    return 0;
}

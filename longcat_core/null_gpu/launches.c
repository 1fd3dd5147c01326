/* Kernels: registered by the libraries that have them, counted when they are launched, never run.
   SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "null_gpu.h"

typedef struct {
    const void *function; /* its address on the host, by which it is launched */
    const char *name;     /* mangled */
} Kernel;

typedef struct {
    const char *name;
    unsigned long long launches;
} Counter;

static Kernel *kernels;
static size_t kernel_count, kernel_room; /* a power of two */
static Counter *counters;
static size_t counter_count, counter_room;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static Kernel *slot_of(const void *function) {
    size_t slot = ((uintptr_t)function >> 4) * 0x9E3779B97F4A7C15ull;
    for (slot &= kernel_room - 1; kernels[slot].function != NULL && kernels[slot].function != function;)
        slot = (slot + 1) & (kernel_room - 1);
    return &kernels[slot];
}

static void insert(const void *function, const char *name) {
    if (2 * (kernel_count + 1) > kernel_room) {
        Kernel *old = kernels;
        size_t old_room = kernel_room;
        kernel_room = old_room ? 2 * old_room : 1 << 16;
        kernels = calloc(kernel_room, sizeof *kernels);
        for (size_t i = 0; i < old_room; i++)
            if (old[i].function != NULL) *slot_of(old[i].function) = old[i];
        free(old);
    }
    Kernel *slot = slot_of(function);
    kernel_count += slot->function == NULL;
    *slot = (Kernel){function, name};
}

static const char *name_of(const void *function) {
    pthread_mutex_lock(&lock);
    const char *name = kernel_room ? slot_of(function)->name : NULL;
    pthread_mutex_unlock(&lock);
    return name ? name : "an unregistered kernel";
}

void count_launch(const char *name) {
    pthread_mutex_lock(&lock);
    size_t i = 0;
    while (i < counter_count && strcmp(counters[i].name, name) != 0) i++;
    if (i == counter_count) {
        if (counter_count == counter_room) {
            counter_room = counter_room ? 2 * counter_room : 256;
            counters = realloc(counters, counter_room * sizeof *counters);
        }
        counters[counter_count++] = (Counter){name, 0};
    }
    counters[i].launches++;
    pthread_mutex_unlock(&lock);
}

void name_kernel(const void *handle, const char *name) {
    pthread_mutex_lock(&lock);
    insert(handle, strdup(name));
    pthread_mutex_unlock(&lock);
}

void count_launch_of(const void *handle) { count_launch(name_of(handle)); }

/* For Python: how many kernels have names, the name of the i-th in the order of their first launches, its launches. */
size_t null_gpu_counters(void) { return counter_count; }
const char *null_gpu_counter_name(size_t i) { return counters[i].name; }
unsigned long long null_gpu_counter_launches(size_t i) { return counters[i].launches; }

void **__cudaRegisterFatBinary(void *binary) {
    (void)binary;
    return new_handle();
}
void __cudaRegisterFatBinaryEnd(void **binary) { (void)binary; }
void __cudaUnregisterFatBinary(void **binary) { (void)binary; }
char __cudaInitModule(void **binary) { (void)binary; return 1; }

void __cudaRegisterFunction(void **binary, const char *function, char *device_function, const char *name, int threads,
                            void *thread_index, void *block_index, void *block, void *grid, int *warp_size) {
    (void)binary, (void)device_function, (void)threads, (void)thread_index;
    (void)block_index, (void)block, (void)grid, (void)warp_size;
    pthread_mutex_lock(&lock);
    insert(function, name);
    pthread_mutex_unlock(&lock);
}

void __cudaRegisterVar(void **binary, char *variable, char *device_address, const char *device_name, int is_extern,
                       size_t size, int is_constant, int is_global) {
    (void)binary, (void)variable, (void)device_address, (void)device_name;
    (void)is_extern, (void)size, (void)is_constant, (void)is_global;
}

static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    configuration.grid = grid;
    configuration.block = block;
    configuration.shared = shared;
    configuration.stream = stream;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *(void **)stream = configuration.stream;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    (void)grid, (void)block, (void)arguments, (void)shared, (void)stream;
    count_launch_of(function);
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return cudaLaunchKernel((const void *)kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return cudaLaunchKernel(function, grid, block, arguments, shared, stream);
}

#undef cudaLaunchKernelExC
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
    return cudaLaunchKernel(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, config->stream);
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    (void)stream;
    function(data);
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    (void)function;
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->binaryVersion = attributes->ptxVersion = 10 * device()->major + device()->minor;
    attributes->maxDynamicSharedSizeBytes = 227 << 10;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads, size_t shared, unsigned int flags) {
    (void)function, (void)threads, (void)shared, (void)flags;
    *blocks = 1;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

cudaError_t cudaLibraryLoadData(cudaLibrary_t *library, const void *code, enum cudaJitOption *jit, void **jit_values, unsigned int jit_count,
                                enum cudaLibraryOption *options, void **values, unsigned int option_count) {
    (void)code, (void)jit, (void)jit_values, (void)jit_count, (void)options, (void)values, (void)option_count;
    *library = new_handle();
    return cudaSuccess;
}

cudaError_t cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t library, const char *name) {
    (void)library;
    *kernel = new_handle();
    name_kernel(*kernel, name);
    return cudaSuccess;
}

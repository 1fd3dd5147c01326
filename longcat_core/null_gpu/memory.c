/* The device's memory: address space without pages behind it, and a limit. SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "null_gpu.h"

#define GRANULARITY ((size_t)2 << 20) /* of the driver's allocations */
#define COPIED_ON_DEVICE ((size_t)1 << 20)

typedef struct {
    char *start;
    size_t bytes;
    enum cudaMemoryType type; /* cudaMemoryTypeHost: pinned memory of the host */
} Allocation;

static Allocation *allocations;
static size_t count, room, taken;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread cudaError_t last_error = cudaSuccess;

cudaError_t failed(cudaError_t error) {
    last_error = error;
    return error;
}

cudaError_t cudaPeekAtLastError(void) { return last_error; }

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorNotSupported: return "operation not supported by the null GPU";
        default: return "error of the null GPU";
    }
}

const char *cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

static void remember(void *start, size_t bytes, enum cudaMemoryType type) {
    if (count == room) {
        room = room ? 2 * room : 1024;
        allocations = realloc(allocations, room * sizeof *allocations);
    }
    allocations[count++] = (Allocation){start, bytes, type};
}

static Allocation *holding(const void *address) {
    for (size_t i = 0; i < count; i++)
        if ((const char *)address >= allocations[i].start && (const char *)address < allocations[i].start + allocations[i].bytes)
            return &allocations[i];
    return NULL;
}

static enum cudaMemoryType type_of(const void *address) {
    pthread_mutex_lock(&lock);
    Allocation *allocation = holding(address);
    enum cudaMemoryType type = allocation ? allocation->type : cudaMemoryTypeUnregistered;
    pthread_mutex_unlock(&lock);
    return type;
}

/* Address space that is committed only where the host writes. */
static cudaError_t take(void **address, size_t bytes) {
    size_t rounded = (bytes + GRANULARITY - 1) / GRANULARITY * GRANULARITY;
    *address = NULL;
    if (bytes == 0) return cudaSuccess;
    pthread_mutex_lock(&lock);
    if (taken + rounded + device()->context <= device()->memory) {
        void *start = mmap(NULL, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (start != MAP_FAILED) {
            *address = start;
            remember(start, rounded, cudaMemoryTypeDevice);
            taken += rounded;
        }
    }
    pthread_mutex_unlock(&lock);
    return *address == NULL ? failed(cudaErrorMemoryAllocation) : cudaSuccess;
}

static cudaError_t give_back(void *address) {
    pthread_mutex_lock(&lock);
    Allocation *allocation = holding(address);
    if (allocation != NULL) {
        if (allocation->type == cudaMemoryTypeDevice) {
            munmap(allocation->start, allocation->bytes);
            taken -= allocation->bytes;
        }
        *allocation = allocations[--count];
    }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

size_t device_memory_free(void) { return device()->memory - device()->context - taken; }

cudaError_t cudaMalloc(void **address, size_t bytes) { return take(address, bytes); }

cudaError_t cudaMallocAsync(void **address, size_t bytes, cudaStream_t stream) {
    (void)stream;
    return take(address, bytes);
}

cudaError_t cudaFree(void *address) {
    return give_back(address);
}

cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) {
    (void)stream;
    return cudaFree(address);
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *free_bytes = device_memory_free();
    *total = device()->memory;
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *address, size_t bytes, unsigned int flags) {
    (void)flags;
    pthread_mutex_lock(&lock);
    remember(address, bytes, cudaMemoryTypeHost);
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *address) { return give_back(address); }

cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned int flags) {
    *address = NULL;
    if (posix_memalign(address, 4096, bytes)) return failed(cudaErrorMemoryAllocation);
    return cudaHostRegister(*address, bytes, flags);
}

cudaError_t cudaFreeHost(void *address) {
    give_back(address);
    free(address);
    return cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void **on_device, void *on_host, unsigned int flags) {
    (void)flags;
    *on_device = on_host;
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = type_of(address);
    attributes->devicePointer = attributes->hostPointer = (void *)address;
    return cudaSuccess;
}

/* What the host has written can be read back. On the device only small copies are made, such as of block tables; what
   kernels would have written is not there. */
static cudaError_t copy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    if (bytes > COPIED_ON_DEVICE) {
        int is_on_device = type_of(to) == cudaMemoryTypeDevice && type_of(from) == cudaMemoryTypeDevice;
        if (kind == cudaMemcpyDeviceToDevice || (kind == cudaMemcpyDefault && is_on_device)) return cudaSuccess;
    }
    memmove(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    return copy(to, from, bytes, kind);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)stream;
    return copy(to, from, bytes, kind);
}

cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes, cudaStream_t stream) {
    (void)to_device, (void)from_device, (void)stream;
    return copy(to, from, bytes, cudaMemcpyDeviceToDevice);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)stream;
    for (size_t row = 0; row < height; row++)
        copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, kind);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *address, int value, size_t bytes) {
    if (bytes <= COPIED_ON_DEVICE) memset(address, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *address, int value, size_t bytes, cudaStream_t stream) {
    (void)stream;
    return cudaMemset(address, value, bytes);
}

cudaError_t cudaIpcOpenMemHandle(void **address, cudaIpcMemHandle_t handle, unsigned int flags) {
    (void)handle, (void)flags;
    return cudaMalloc(address, 1); /* what a peer has is never read */
}

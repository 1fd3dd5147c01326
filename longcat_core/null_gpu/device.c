/* What the device says of itself: properties and attributes, from the environment. SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "null_gpu.h"

#define KIB ((size_t)1 << 10)
#define MIB ((size_t)1 << 20)

/* Of Hopper and later data-centre GPUs (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"). */
#define THREADS_A_BLOCK 1024
#define THREADS_A_MULTIPROCESSOR 2048
#define BLOCKS_A_MULTIPROCESSOR 32
#define REGISTERS 65536
#define SHARED_A_BLOCK (48 * KIB)
#define SHARED_A_BLOCK_ON_REQUEST (227 * KIB)
#define SHARED_A_MULTIPROCESSOR (228 * KIB)
#define SHARED_RESERVED_A_BLOCK KIB
#define L2_CACHE (50 * MIB)
#define DRIVER_VERSION 13000

static Device the_device;
static pthread_once_t read_once = PTHREAD_ONCE_INIT;

static const char *setting(const char *name) {
    const char *value = getenv(name);
    if (value == NULL || *value == 0) {
        fprintf(stderr, "null GPU: %s is not set; start this with `longcat dry-run`\n", name);
        abort();
    }
    return value;
}

static void read_environment(void) {
    snprintf(the_device.name, sizeof the_device.name, "%s", setting("NULL_GPU_NAME"));
    the_device.count = atoi(setting("NULL_GPU_COUNT"));
    sscanf(setting("NULL_GPU_CAPABILITY"), "%d.%d", &the_device.major, &the_device.minor);
    the_device.memory = strtoull(setting("NULL_GPU_MEMORY_MIB"), NULL, 10) * MIB;
    the_device.context = strtoull(setting("NULL_GPU_CONTEXT_MIB"), NULL, 10) * MIB;
    the_device.multiprocessors = atoi(setting("NULL_GPU_MULTIPROCESSORS"));
}

const Device *device(void) {
    pthread_once(&read_once, read_environment);
    return &the_device;
}

static __thread int current_device = 0;

cudaError_t cudaGetDevice(int *index) {
    *index = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int index) {
    if (index < 0 || index >= device()->count) return failed(cudaErrorInvalidDevice);
    current_device = index;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = device()->count;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int index) {
    memset(properties, 0, sizeof *properties);
    snprintf(properties->name, sizeof properties->name, "%s", device()->name);
    properties->uuid.bytes[0] = (char)index;
    properties->totalGlobalMem = device()->memory;
    properties->sharedMemPerBlock = SHARED_A_BLOCK;
    properties->sharedMemPerBlockOptin = SHARED_A_BLOCK_ON_REQUEST;
    properties->sharedMemPerMultiprocessor = SHARED_A_MULTIPROCESSOR;
    properties->reservedSharedMemPerBlock = SHARED_RESERVED_A_BLOCK;
    properties->regsPerBlock = REGISTERS;
    properties->regsPerMultiprocessor = REGISTERS;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = THREADS_A_BLOCK;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = THREADS_A_BLOCK;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = 0x7fffffff;
    properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->major = device()->major;
    properties->minor = device()->minor;
    properties->multiProcessorCount = device()->multiprocessors;
    properties->maxThreadsPerMultiProcessor = THREADS_A_MULTIPROCESSOR;
    properties->maxBlocksPerMultiProcessor = BLOCKS_A_MULTIPROCESSOR;
    properties->l2CacheSize = (int)L2_CACHE;
    properties->totalConstMem = 64 * KIB;
    properties->textureAlignment = 512;
    properties->pciBusID = index + 1;
    properties->concurrentKernels = properties->canMapHostMemory = properties->unifiedAddressing = 1;
    properties->cooperativeLaunch = properties->clusterLaunch = properties->memoryPoolsSupported = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int index) {
    (void)index;
    switch ((int)attribute) {
        case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY:
            *value = THREADS_A_BLOCK; break;
        case cudaDevAttrMaxBlockDimZ: *value = 64; break;
        case cudaDevAttrMaxGridDimX: *value = 0x7fffffff; break;
        case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)SHARED_A_BLOCK; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)SHARED_A_BLOCK_ON_REQUEST; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)SHARED_A_MULTIPROCESSOR; break;
        case cudaDevAttrReservedSharedMemoryPerBlock: *value = (int)SHARED_RESERVED_A_BLOCK; break;
        case cudaDevAttrTotalConstantMemory: *value = (int)(64 * KIB); break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor:
            *value = REGISTERS; break;
        case cudaDevAttrMultiProcessorCount: *value = device()->multiprocessors; break;
        case cudaDevAttrL2CacheSize: *value = (int)L2_CACHE; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = THREADS_A_MULTIPROCESSOR; break;
        case cudaDevAttrMaxBlocksPerMultiprocessor: *value = BLOCKS_A_MULTIPROCESSOR; break;
        case cudaDevAttrComputeCapabilityMajor: *value = device()->major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = device()->minor; break;
        case cudaDevAttrConcurrentKernels: case cudaDevAttrCanMapHostMemory: case cudaDevAttrUnifiedAddressing:
        case cudaDevAttrCooperativeLaunch: case cudaDevAttrClusterLaunch: case cudaDevAttrMemoryPoolsSupported:
        case cudaDevAttrStreamPrioritiesSupported: case cudaDevAttrHostRegisterSupported:
            *value = 1; break;
        default: *value = 0; /* which also says: not integrated, no multicast, no fabric handles */
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int index, int peer) {
    *can = index != peer;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int index) {
    snprintf(id, (size_t)length, "00000000:%02x:00.0", index + 1);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = DRIVER_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = DRIVER_VERSION;
    return cudaSuccess;
}

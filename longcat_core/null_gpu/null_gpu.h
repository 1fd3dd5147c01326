/* A GPU that accepts every call and computes nothing: what its parts share. SPDX-License-Identifier: Apache-2.0 */
#ifndef NULL_GPU_H
#define NULL_GPU_H

#include <stddef.h>
#include <cuda_runtime_api.h>

/* What the device says of itself, from the environment: see device.c. */
typedef struct {
    char name[128];
    int count;              /* devices that this process sees */
    int major, minor;       /* compute capability */
    size_t memory;          /* bytes that the driver reports */
    size_t context;         /* bytes of these that are taken before the first allocation */
    int multiprocessors;
} Device;

const Device *device(void);

/* Remember an error, as the runtime does, and return it. */
cudaError_t failed(cudaError_t error);

/* Bytes that can still be allocated on the device. */
size_t device_memory_free(void);

/* Count one launch of a kernel, or of a routine of a library. `name` must live as long as the process. */
void count_launch(const char *name);

/* Give a kernel that is launched by `handle` a name, and count a launch of it. */
void name_kernel(const void *handle, const char *name);
void count_launch_of(const void *handle);

/* A different handle each time: streams, events, graphs and whatever else only has to be no null pointer. */
void *new_handle(void);

#endif

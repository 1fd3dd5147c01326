/* NVML, by which engines find GPUs before they use CUDA. SPDX-License-Identifier: Apache-2.0 */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "null_gpu.h"

int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned int flags) {
    (void)flags;
    return 0;
}
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int error) {
    (void)error;
    return "error of the null GPU";
}
int nvmlSystemGetDriverVersion(char *version, unsigned int length) {
    snprintf(version, length, "580.00");
    return 0;
}
int nvmlSystemGetCudaDriverVersion_v2(int *version) { return cudaDriverGetVersion(version); }
int nvmlDeviceGetCount_v2(unsigned int *count) { return cudaGetDeviceCount((int *)count); }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **handle) {
    *handle = (void *)(uintptr_t)(index + 1);
    return 0;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **handle) {
    unsigned int domain, bus = 1;
    sscanf(id, "%x:%x", &domain, &bus);
    return nvmlDeviceGetHandleByIndex_v2(bus - 1, handle);
}
int nvmlDeviceGetComputeRunningProcesses(void *handle, unsigned int *count, void *processes) {
    (void)handle, (void)processes;
    *count = 0;
    return 0;
}
#define NOT_SUPPORTED 3
int nvmlDeviceGetNvLinkRemoteDeviceType(void) { return NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void) { return NOT_SUPPORTED; }
int nvmlDeviceGetIndex(void *handle, unsigned int *index) {
    *index = (unsigned int)(uintptr_t)handle - 1;
    return 0;
}
int nvmlDeviceGetName(void *handle, char *name, unsigned int length) {
    (void)handle;
    snprintf(name, length, "%s", device()->name);
    return 0;
}
int nvmlDeviceGetUUID(void *handle, char *identity, unsigned int length) {
    snprintf(identity, length, "GPU-00000000-0000-0000-0000-%012u", (unsigned int)(uintptr_t)handle);
    return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    (void)handle;
    *major = device()->major;
    *minor = device()->minor;
    return 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory) {
    (void)handle;
    memory[0] = device()->memory;
    memory[1] = device_memory_free();
    memory[2] = memory[0] - memory[1];
    return 0;
}
int nvmlDeviceGetP2PStatus(void *handle, void *peer, int capability, int *status) {
    (void)handle, (void)peer, (void)capability;
    *status = 0; /* connected */
    return 0;
}

/* In place of NVIDIA's file of this name, which comes with the compiler only: macros that plain C needs of it.
   SPDX-License-Identifier: Apache-2.0 */
#define __CUDACC_VER_MAJOR__ 13
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __host__
#define __device__
#define __forceinline__ static inline
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define CUDAAPI

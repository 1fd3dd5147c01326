/* Forks: what PyTorch does so that no child uses the parent's GPU is left out, as a child may have the null GPU.
   SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>

typedef void Handler(void);

/* What `pthread_atfork` of glibc calls. */
int __register_atfork(Handler *prepare, Handler *parent, Handler *child, void *owner) {
    static int (*next)(Handler *, Handler *, Handler *, void *);
    Dl_info library;
    if (child != NULL && dladdr((void *)child, &library) && strstr(library.dli_fname, "libtorch_python") != NULL) return 0;
    if (next == NULL) next = (int (*)(Handler *, Handler *, Handler *, void *))dlsym(RTLD_NEXT, "__register_atfork");
    return next(prepare, parent, child, owner);
}

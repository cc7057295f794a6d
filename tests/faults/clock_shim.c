/* Shifts the wall clock of the process it is preloaded into by the microseconds found in a file, as they change.

   gcc -shared -fPIC -O2 -o clock_shim.so clock_shim.c
   CLOCK_SHIM=/path/to/8-byte-file LD_PRELOAD=./clock_shim.so redis-server …

   Only CLOCK_REALTIME moves; monotonic clocks are left alone. Neither malloc nor dlsym is called, because allocators ask
   for the time before they can serve (libfaketime hangs with jemalloc for that reason): the real time comes from the
   system call. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile const int64_t *offset;

__attribute__((constructor)) static void open_offset(void) {
    const char *path = getenv("CLOCK_SHIM");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *map = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (map != MAP_FAILED) offset = map;
}

static void shift(struct timespec *ts) {
    int64_t us = offset ? *offset : 0;
    int64_t ns = ts->tv_nsec + (us % 1000000) * 1000;
    ts->tv_sec += us / 1000000;
    if (ns < 0) { ns += 1000000000; ts->tv_sec -= 1; }
    if (ns >= 1000000000) { ns -= 1000000000; ts->tv_sec += 1; }
    ts->tv_nsec = ns;
}

int clock_gettime(clockid_t clock, struct timespec *ts) {
    long failed = syscall(SYS_clock_gettime, clock, ts);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) shift(ts);
    return (int)failed;
}

int gettimeofday(struct timeval *restrict tv, void *restrict zone) {
    struct timespec ts;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &ts)) return -1;
    tv->tv_sec = ts.tv_sec;
    tv->tv_usec = ts.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec ts;
    if (clock_gettime(CLOCK_REALTIME, &ts)) return -1;
    if (out) *out = ts.tv_sec;
    return ts.tv_sec;
}

/* Shows a process another time of day: CLOCK_REALTIME moved by the seconds that stand in the file $CHAOS_CLOCK, which may
   change at any moment. Durations, sleeps and the monotonic clock stay as they are; a wait that ends at a time of day, which the
   kernel knows nothing of, is told the real one. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t nothing = 0;
static const volatile int64_t *seconds = &nothing;
static int (*real_clock_gettime)(clockid_t, struct timespec *);

__attribute__((constructor)) static void start(void) {
    real_clock_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("CHAOS_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *mapped = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    if (mapped != MAP_FAILED) seconds = mapped;
    close(file);
}

int clock_gettime(clockid_t which, struct timespec *now) {
    if (!real_clock_gettime) start();
    int result = real_clock_gettime(which, now);
    if (!result && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) now->tv_sec += *seconds;
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    (void)zone;
    int result = clock_gettime(CLOCK_REALTIME, &exact);
    if (!result) {
        now->tv_sec = exact.tv_sec;
        now->tv_usec = exact.tv_nsec / 1000;
    }
    return result;
}

time_t time(time_t *where) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (where) *where = exact.tv_sec;
    return exact.tv_sec;
}

static struct timespec real_time(const struct timespec *shown) {
    struct timespec real = *shown;
    real.tv_sec -= *seconds;
    return real;
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
    static int (*wait)(sem_t *, const struct timespec *);
    if (!wait) wait = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec real = real_time(until);
    return wait(semaphore, &real);
}

/* PyTorch's wheels wait by it, for libstdc++ did not know pthread_cond_clockwait where they were built. A deadline that has
   passed long since would make them ask for it again and again, and keep who could end the wait from the mutex. */
int pthread_cond_timedwait(
    pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex, const struct timespec *restrict until) {
    static int (*wait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    if (!wait) wait = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2"); /* dlsym finds an older one */
    if (!wait) wait = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    int monotonic = condition->__data.__wrefs & 2; /* as pthread_condattr_setclock left it */
    struct timespec real = monotonic ? *until : real_time(until);
    return wait(condition, mutex, &real);
}

int pthread_mutex_timedlock(pthread_mutex_t *restrict mutex, const struct timespec *restrict until) {
    static int (*lock)(pthread_mutex_t *, const struct timespec *);
    if (!lock) lock = dlsym(RTLD_NEXT, "pthread_mutex_timedlock");
    struct timespec real = real_time(until);
    return lock(mutex, &real);
}

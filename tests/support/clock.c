/* With LD_PRELOAD: a machine whose clock is set while its programs run. The file that CLOCK names holds two int64:
 * seconds by which the time of day is ahead, and seconds by which the machine has run for longer. A forked process
 * may set another CLOCK, and one without has the machine's own clock. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static const int64_t nothing[2];
static const volatile int64_t *ahead = nothing;
static const char *mapped;

static int64_t seconds_ahead(int clock)
{
    const char *name = getenv("CLOCK");
    if (name != mapped) {
        int fd = open(name, O_RDONLY | O_CLOEXEC);
        ahead = mmap(NULL, sizeof nothing, PROT_READ, MAP_SHARED, fd, 0);
        close(fd);
        mapped = name;
    }
    return ahead[clock == CLOCK_BOOTTIME];
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int done = syscall(SYS_clock_gettime, clock, now);
    if (done == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_BOOTTIME))
        now->tv_sec += seconds_ahead(clock);
    return done;
}

int futimens(int fd, const struct timespec times[2])
{
    struct timespec now[2];
    if (times == NULL) {
        clock_gettime(CLOCK_REALTIME, now);
        now[1] = now[0];
        times = now;
    }
    return syscall(SYS_utimensat, fd, NULL, times, 0);
}

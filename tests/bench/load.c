/* The benchmark's client: HTTP/1.1 in the clear to 127.0.0.1, one thread, epoll.
 *
 *     load requests    PORT connections=16 seconds=2   short requests, one after the other on each connection
 *     load reconnects  PORT connections=16 seconds=2   the same, each by a new connection to upstream
 *     load completions PORT connections=16 seconds=2   POST requests
 *     load streams     PORT connections=100 events=100 interval=20000 seconds=3
 *                                                      stamps=0: of the sandbox, whose events have no time stamps;
 *                                                      close=1: each by a new connection to upstream
 *     load upload      PORT size=20000000 chunked=1 repeat=5
 *     load download    PORT size=200000000 repeat=1
 *     load head        PORT                            only prints the head of a short request
 *
 * Each connection sends a request, reads the answer and starts again, until `seconds` have passed since the
 * window began, or `repeat` times. The window begins when every connection has had an answer (streams: an
 * event) and `warm` seconds have passed, or at once with `repeat`. Only what ends inside the window is
 * measured, and the CPU time of the processes in `pids` is taken at both of its ends.
 *
 * No two requests have the same head: each has a random X-Client-Request-Id, and a body with a Content-Length is up to
 * 127 bytes longer than that of its mode and `size`, by a random number of bytes.
 *
 * In the window of `reconnects` and of streams with close=1, an answer is wrong unless the proxy opened a connection to
 * upstream for it and, over TLS, resumed a session. Upstream's X-Bench-Connection names the kind of connection.
 *
 * A line "begin" when the window begins; then one JSON object: times in microseconds, `seconds` and CPU in
 * seconds. Every answer is checked to its end; exit status 1 when one was wrong or missing.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { IN_SIZE = 128 << 10, TEXT_SIZE = 16 << 10, PATTERN_SIZE = 1 << 20, CHUNK_SIZE = 16 << 10, LENGTHS = 128 };

enum mode { REQUESTS, RECONNECTS, COMPLETIONS, STREAMS, UPLOAD, DOWNLOAD, HEAD_ONLY };
static const char *const mode_names[] = {"requests", "reconnects", "completions", "streams", "upload", "download",
                                         "head"};

static struct {
    enum mode mode;
    int port;
    long connections, repeat, events, interval /* us between events */, event_size, size, chunked, stamps,
        close; /* each request asks upstream for Connection: close */
    double seconds, warm;
    double ramp;  /* connections opened a second; 0: all at once */
    double limit; /* seconds for everything */
    const char *key, *pids;
} options = {.connections = 1, .events = 1, .event_size = 250, .stamps = 1, .seconds = 2, .warm = 0.3, .limit = 45,
             .key = "client-key-of-the-benchmark"};

/* ---- time, samples, errors ---- */

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

struct samples { float *values; size_t count, room; };

static void add(struct samples *samples, double seconds) {
    if (samples->count == samples->room) {
        samples->room = samples->room ? 2 * samples->room : 4096;
        samples->values = realloc(samples->values, samples->room * sizeof *samples->values);
    }
    samples->values[samples->count++] = seconds * 1e6;
}

static int compare(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static struct samples latencies, first_events, delays;
static long answers, events, errors, bytes; /* all but errors: inside the window */
static char first_error[160];

__attribute__((format(printf, 1, 2))) static void wrong(const char *format, ...) {
    if (errors++) return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(first_error, sizeof first_error, format, arguments);
    va_end(arguments);
}

/* ---- what is sent: a head, whose last fields differ each time, and a body that repeats a pattern ---- */

static char head[4096], pattern[PATTERN_SIZE], tail[8];
static long head_size, fixed_size /* of the head's part that all requests share */, pattern_size;
static long least_size /* of a body on the wire, without the tail */;

static uint64_t random_bits(void) { /* xorshift64 */
    static uint64_t state;
    while (!state && getrandom(&state, sizeof state, 0) < 0) {}
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

static void prepare_requests(void) {
    const char *path = options.close ? "/v1/models?close" : "/v1/models";
    char download[64];
    if (options.mode == STREAMS || options.mode == COMPLETIONS) {
        path = options.close ? "/v1/chat/completions?close" : "/v1/chat/completions";
        memset(pattern, ' ', sizeof pattern); /* JSON may end in spaces: for bodies of different lengths */
        least_size = sprintf(pattern, "{\"model\":\"grok-4.5\",\"stream\":%s,"
                             "\"messages\":[{\"role\":\"user\",\"content\":"
                             "\"bench events=%ld interval=%ld size=%ld \"}]}",
                             options.mode == STREAMS ? "true" : "false", options.events, options.interval,
                             options.event_size);
        pattern[least_size] = ' ';
        pattern_size = least_size + LENGTHS;
    } else if (options.mode == DOWNLOAD) {
        snprintf(download, sizeof download, "/v1/files/bench-%ld/content", options.size);
        path = download;
    } else if (options.mode == UPLOAD) {
        path = "/v1/files";
        memset(pattern, 'u', sizeof pattern);
        pattern_size = sizeof pattern;
        least_size = options.size;
        if (options.chunked) { /* size is rounded up to whole chunks */
            char *end = pattern;
            while (end + CHUNK_SIZE + 16 <= pattern + sizeof pattern) {
                end += sprintf(end, "%x\r\n", CHUNK_SIZE);
                end += CHUNK_SIZE;
                memcpy(end, "\r\n", 2);
                end += 2;
            }
            pattern_size = end - pattern;
            long chunks = (options.size + CHUNK_SIZE - 1) / CHUNK_SIZE;
            options.size = chunks * CHUNK_SIZE;
            least_size = chunks * (CHUNK_SIZE + 8);
            strcpy(tail, "0\r\n\r\n");
        }
    }
    /* The fields are those of the OpenAI library for Python. */
    fixed_size = snprintf(head, sizeof head,
        "%s %s HTTP/1.1\r\n"
        "Host: 127.0.0.1:%d\r\n"
        "Accept-Encoding: gzip, deflate\r\n"
        "Connection: keep-alive\r\n"
        "Accept: application/json\r\n"
        "Content-Type: %s\r\n"
        "User-Agent: OpenAI/Python 2.8.1\r\n"
        "X-Stainless-Lang: python\r\n"
        "X-Stainless-Package-Version: 2.8.1\r\n"
        "X-Stainless-OS: Linux\r\n"
        "X-Stainless-Arch: x64\r\n"
        "X-Stainless-Runtime: CPython\r\n"
        "X-Stainless-Runtime-Version: 3.11.7\r\n"
        "Authorization: Bearer %s\r\n"
        "X-Stainless-Async: false\r\n"
        "x-stainless-retry-count: 0\r\n"
        "x-stainless-read-timeout: 600\r\n",
        least_size ? "POST" : "GET", path, options.port,
        options.mode == UPLOAD ? "application/octet-stream" : "application/json", options.key);
}

/* Completes the head of the next request, whose body has `size` bytes on the wire. */
static void vary_head(long size) {
    char framing[64] = "";
    if (options.chunked) strcpy(framing, "Transfer-Encoding: chunked\r\n");
    else if (size) sprintf(framing, "Content-Length: %ld\r\n", size);
    head_size = fixed_size + sprintf(head + fixed_size, "X-Client-Request-Id: %016" PRIx64 "%016" PRIx64 "\r\n%s\r\n",
                                     random_bits(), random_bits(), framing);
}

/* ---- connections ---- */

enum expecting { HEAD, CONTENT, CHUNK_HEAD, CHUNK_DATA, CHUNK_END, TRAILER };

struct connection {
    int fd, connected, answered;
    long done;                /* requests */
    long body_size, sent;     /* bytes of the body on the wire: without its tail, and with it */
    double started;
    enum expecting expecting;
    long left;                /* bytes of the content or chunk that are still to come */
    long received, arrived;   /* body bytes, and events with a time stamp, of this answer */
    int closing, ended;       /* the answer has Connection: close; [DONE] was seen */
    char *in, *text;          /* what was read and not parsed; body text up to the next end of an event */
    size_t in_size, text_size;
};

static int epoll;
static long active, opened, answering;
static double window_begin, window_end;
static int in_window;

static void watch(struct connection *connection, int operation, uint32_t events_wanted) {
    struct epoll_event event = {.events = events_wanted, .data.ptr = connection};
    epoll_ctl(epoll, operation, connection->fd, &event);
}

static void connect_to_target(struct connection *connection) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(options.port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int one = 1;
    connection->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    connection->connected = 0;
    setsockopt(connection->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    connect(connection->fd, (struct sockaddr *)&address, sizeof address);
    watch(connection, EPOLL_CTL_ADD, EPOLLOUT);
}

static void disconnect(struct connection *connection) {
    close(connection->fd);
    connection->fd = -1;
    active--;
}

static void send_body(struct connection *connection) {
    long body_size = connection->body_size, whole = body_size + strlen(tail);
    while (connection->sent < whole) {
        const char *from = tail + (connection->sent - body_size);
        long size = whole - connection->sent;
        if (connection->sent < body_size) {
            long offset = connection->sent % pattern_size, left = body_size - connection->sent;
            from = pattern + offset;
            size = pattern_size - offset < left ? pattern_size - offset : left;
        }
        ssize_t sent = send(connection->fd, from, size, MSG_NOSIGNAL);
        if (sent < 0) { /* if the connection is broken, the next read fails */
            watch(connection, EPOLL_CTL_MOD, errno == EAGAIN ? EPOLLIN | EPOLLOUT : EPOLLIN);
            return;
        }
        connection->sent += sent;
    }
    if (options.mode == UPLOAD) watch(connection, EPOLL_CTL_MOD, EPOLLIN);
}

static void start_request(struct connection *connection) {
    connection->expecting = HEAD;
    connection->received = connection->arrived = 0;
    connection->closing = connection->ended = 0;
    connection->in_size = connection->text_size = 0;
    connection->sent = 0;
    connection->body_size = least_size && !options.chunked ? least_size + random_bits() % LENGTHS : least_size;
    vary_head(connection->body_size);
    connection->started = now();
    if (connection->body_size && options.mode != UPLOAD) { /* in one send, as clients' short requests are */
        memcpy(head + head_size, pattern, connection->body_size);
        connection->sent = connection->body_size;
    }
    long size = head_size + connection->sent;
    if (send(connection->fd, head, size, MSG_NOSIGNAL) != size) {
        wrong("request could not be sent: %s", strerror(errno));
        disconnect(connection);
    } else if (options.mode == UPLOAD) {
        send_body(connection);
    }
}

static void check_answer(struct connection *connection) {
    if (options.mode == STREAMS && (connection->arrived != options.events || !connection->ended))
        wrong("stream ended well framed, but after %ld of %ld events and %s [DONE]", connection->arrived,
              options.events, connection->ended ? "with" : "without");
    if (options.mode == DOWNLOAD && connection->received != options.size)
        wrong("download of %ld bytes instead of %ld", connection->received, options.size);
    if (options.mode == UPLOAD) {
        char expected[64];
        long size = options.chunked ? options.size : connection->body_size;
        snprintf(expected, sizeof expected, "\"bytes\":%ld}", size);
        connection->text[connection->text_size] = 0;
        if (!strstr(connection->text, expected))
            wrong("upload of %ld bytes was answered %.60s", size, connection->text);
    }
}

static void end_answer(struct connection *connection) {
    double time = now();
    check_answer(connection);
    if (in_window) {
        answers++;
        bytes += connection->received;
        add(&latencies, time - connection->started);
    }
    if (!connection->answered && options.mode != STREAMS) connection->answered = 1, answering++;
    connection->done++;
    if (options.repeat ? connection->done >= options.repeat : window_end && time >= window_end) {
        disconnect(connection);
    } else if (connection->closing) {
        close(connection->fd);
        connect_to_target(connection);
    } else {
        start_request(connection);
    }
}

/* ---- what is received ---- */

static void take_event(struct connection *connection, const char *text, size_t size) {
    const char *mark = options.stamps ? "T=" : "{\"content\":"; /* T=: when upstream sent it, ns of CLOCK_MONOTONIC */
    const char *stamp = memmem(text, size, mark, strlen(mark));
    if (!stamp) {
        if (memmem(text, size, "[DONE]", 6)) connection->ended = 1;
        return;
    }
    double time = now();
    if (!connection->arrived++) {
        if (in_window) add(&first_events, time - connection->started);
        if (!connection->answered) connection->answered = 1, answering++;
    }
    if (in_window) {
        events++;
        if (options.stamps) add(&delays, time - strtoll(stamp + 2, NULL, 10) / 1e9);
    }
}

static void take_body(struct connection *connection, const char *data, size_t size) {
    connection->received += size;
    if (options.mode != STREAMS && options.mode != UPLOAD) return;
    if (connection->text_size + size >= TEXT_SIZE) {
        wrong("an event longer than %d bytes", TEXT_SIZE);
        size = TEXT_SIZE - 1 - connection->text_size;
    }
    char *text = connection->text, *end;
    memcpy(text + connection->text_size, data, size);
    connection->text_size += size;
    if (options.mode == UPLOAD) return;
    while ((end = memmem(text, connection->text + connection->text_size - text, "\n\n", 2))) {
        take_event(connection, text, end - text);
        text = end + 2;
    }
    connection->text_size -= text - connection->text;
    memmove(connection->text, text, connection->text_size);
}

/* The value of a field of the answer's head, or NULL. `name` begins with the end of the line before it. */
static char *field(char *answer, const char *name) {
    char *line = strcasestr(answer, name);
    return line ? line + strlen(name) + strspn(line + strlen(name), " ") : NULL;
}

/* Returns 0 when the answer cannot be understood. */
static int take_head(struct connection *connection, char *answer) {
    char *value;
    int status = atoi(answer + 9);
    if (status == 100) return 1;
    if (status != 200) {
        wrong("answer with status %d", status);
        return 0;
    }
    value = field(answer, "\nx-bench-connection:");
    if (options.close && in_window && (!value || strncmp(value, "new\r", 4))) {
        wrong("answer over an upstream connection that is %.*s, not new with its session resumed",
              value ? (int)strcspn(value, "\r") : 7, value ? value : "unknown");
        return 0;
    }
    connection->closing = (value = field(answer, "\nconnection:")) && !strncasecmp(value, "close", 5);
    if (field(answer, "\ntransfer-encoding:")) {
        connection->expecting = CHUNK_HEAD;
    } else if ((value = field(answer, "\ncontent-length:"))) {
        connection->expecting = CONTENT;
        connection->left = atol(value);
    } else {
        wrong("answer with neither Content-Length nor Transfer-Encoding");
        return 0;
    }
    return 1;
}

/* Parses what was read and returns how many bytes it took. *over: 1 when the answer has ended, -1 when it is
 * no good. */
static size_t parse(struct connection *connection, int *over) {
    char *at = connection->in, *end = at + connection->in_size, *line;
    while (at < end || (connection->expecting == CONTENT && !connection->left)) {
        if (connection->expecting == CONTENT || connection->expecting == CHUNK_DATA) {
            long size = end - at < connection->left ? end - at : connection->left;
            take_body(connection, at, size);
            at += size;
            if ((connection->left -= size)) break;
            if (connection->expecting == CONTENT) {
                *over = 1;
                break;
            }
            connection->expecting = CHUNK_END;
            continue;
        }
        const char *delimiter = connection->expecting == HEAD ? "\r\n\r\n" : "\r\n";
        if (!(line = memmem(at, end - at, delimiter, strlen(delimiter)))) break;
        line[connection->expecting == HEAD ? 2 : 0] = 0;
        char *next = line + strlen(delimiter);
        if (connection->expecting == HEAD) {
            if (!take_head(connection, at)) *over = -1;
        } else if (connection->expecting == CHUNK_HEAD) {
            connection->left = strtol(at, NULL, 16);
            connection->expecting = connection->left ? CHUNK_DATA : TRAILER;
        } else if (connection->expecting == CHUNK_END) {
            connection->expecting = CHUNK_HEAD;
        } else if (line == at) { /* the empty line after the trailer */
            *over = 1;
        }
        at = next;
        if (*over) break;
    }
    return at - connection->in;
}

static void receive(struct connection *connection) {
    size_t room = IN_SIZE - connection->in_size;
    ssize_t size = recv(connection->fd, connection->in + connection->in_size, room, 0);
    if (size < 0 && errno == EAGAIN) return;
    if (size <= 0) {
        wrong("connection broke (%s) after %ld bytes and %ld events of an answer",
              size ? strerror(errno) : "end of file", connection->received, connection->arrived);
        disconnect(connection);
        return;
    }
    connection->in_size += size;
    int over = 0;
    size_t taken = parse(connection, &over);
    connection->in_size -= taken;
    if (over > 0 && !connection->in_size) {
        end_answer(connection);
    } else if (over) {
        if (over > 0) wrong("%zu bytes after the end of an answer", connection->in_size);
        disconnect(connection);
    } else {
        memmove(connection->in, connection->in + taken, connection->in_size);
    }
}

static void on_event(struct connection *connection, uint32_t happened) {
    if (!connection->connected) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(connection->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        if (error) {
            wrong("connecting to port %d: %s", options.port, strerror(error));
            disconnect(connection);
            return;
        }
        connection->connected = 1;
        watch(connection, EPOLL_CTL_MOD, EPOLLIN);
        start_request(connection);
        return;
    }
    if (happened & EPOLLOUT) send_body(connection);
    if (happened & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(connection);
}

/* ---- the run ---- */

static double target_cpu(void) {
    double seconds = 0;
    for (const char *pid = options.pids; pid && *pid; pid = strchr(pid, ',') ? strchr(pid, ',') + 1 : NULL) {
        clockid_t clock;
        struct timespec time;
        if (clock_getcpuclockid(atoi(pid), &clock) || clock_gettime(clock, &time))
            wrong("process %d is gone", atoi(pid));
        else
            seconds += time.tv_sec + time.tv_nsec / 1e9;
    }
    return seconds;
}

static double own_cpu(void) {
    struct timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static double cpu_begin, cpu_end, own_begin, own_end;

static void begin_window(void) {
    window_begin = now();
    window_end = options.repeat ? window_begin + options.limit : window_begin + options.seconds;
    in_window = 1;
    cpu_begin = target_cpu();
    own_begin = own_cpu();
    puts("begin");
    fflush(stdout);
}

static void end_window(void) {
    window_end = now();
    in_window = 0;
    cpu_end = target_cpu();
    own_end = own_cpu();
}

static void run(struct connection *connections) {
    struct epoll_event happened[256];
    double start = now();
    epoll = epoll_create1(0);
    if (options.repeat) begin_window();
    while (opened < options.connections || active) {
        double time = now();
        if (time > start + options.limit) {
            wrong("%ld of %ld connections were not through after %g s", active, options.connections,
                  options.limit);
            break;
        }
        long wanted = options.ramp ? 1 + (long)((time - start) * options.ramp) : options.connections;
        for (; opened < wanted && opened < options.connections; opened++, active++) {
            connections[opened].in = malloc(IN_SIZE);
            connections[opened].text = malloc(TEXT_SIZE);
            connect_to_target(&connections[opened]);
        }
        if (!window_begin && answering == options.connections && time >= start + options.warm) begin_window();
        if (in_window && time >= window_end) end_window();
        int count = epoll_wait(epoll, happened, 256, opened < options.connections ? 1 : 20);
        for (int i = 0; i < count; i++) on_event(happened[i].data.ptr, happened[i].events);
    }
    if (in_window) end_window();
    if (!window_begin) wrong("only %ld of %ld connections had an answer", answering, options.connections);
}

static void print_percentiles(const char *name, struct samples *samples) {
    qsort(samples->values, samples->count, sizeof *samples->values, compare);
    if (!samples->count) return;
    printf(",\"%s_p50\":%.1f,\"%s_p99\":%.1f", name, samples->values[(samples->count - 1) / 2],
           name, samples->values[(samples->count - 1) * 99 / 100]);
}

static void print_result(void) {
    double seconds = window_end - window_begin;
    printf("{\"answers\":%ld,\"events\":%ld,\"bytes\":%ld,\"seconds\":%.6f,\"cpu\":%.6f,\"client_cpu\":%.6f,"
           "\"client_cpu_whole\":%.6f",
           answers, events, bytes, seconds, cpu_end - cpu_begin, own_end - own_begin, own_cpu());
    print_percentiles("latency", &latencies);
    print_percentiles("first_event", &first_events);
    print_percentiles("delay", &delays);
    for (char *c = first_error; *c; c++)
        if (*c == '"' || *c == '\\' || (unsigned char)*c < ' ') *c = '\'';
    printf(",\"errors\":%ld,\"error\":\"%s\"}\n", errors, first_error);
}

static void usage(const char *what) {
    fprintf(stderr, "load: %s is not understood; "
            "load requests|reconnects|completions|streams|upload|download|head PORT NAME=VALUE...\n", what);
    exit(64);
}

static void parse_arguments(int count, char **arguments) {
    struct { const char *name; long *whole; double *real; const char **text; } known[] = {
        {"connections", .whole = &options.connections}, {"repeat", .whole = &options.repeat},
        {"events", .whole = &options.events}, {"interval", .whole = &options.interval},
        {"event_size", .whole = &options.event_size}, {"size", .whole = &options.size},
        {"chunked", .whole = &options.chunked}, {"stamps", .whole = &options.stamps},
        {"close", .whole = &options.close},
        {"seconds", .real = &options.seconds},
        {"warm", .real = &options.warm}, {"ramp", .real = &options.ramp}, {"limit", .real = &options.limit},
        {"key", .text = &options.key}, {"pids", .text = &options.pids}};
    if (count < 3) usage("no mode and port");
    while (strcmp(arguments[1], mode_names[options.mode]))
        if (++options.mode > HEAD_ONLY) usage(arguments[1]);
    options.port = atoi(arguments[2]);
    options.close = options.mode == RECONNECTS;
    for (int i = 3; i < count; i++) {
        size_t k = 0, length = strcspn(arguments[i], "=");
        while (k < sizeof known / sizeof *known &&
               (strncmp(known[k].name, arguments[i], length) || known[k].name[length])) k++;
        if (k == sizeof known / sizeof *known || !arguments[i][length]) usage(arguments[i]);
        char *value = arguments[i] + length + 1;
        if (known[k].whole) *known[k].whole = atol(value);
        if (known[k].real) *known[k].real = atof(value);
        if (known[k].text) *known[k].text = value;
    }
}

int main(int count, char **arguments) {
    parse_arguments(count, arguments);
    if (options.mode == HEAD_ONLY) {
        prepare_requests();
        vary_head(0);
        return fwrite(head, 1, head_size, stdout) != (size_t)head_size;
    }
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    prepare_requests();
    run(calloc(options.connections, sizeof(struct connection)));
    print_result();
    return errors > 0;
}

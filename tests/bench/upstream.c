/* The benchmark's upstream: an API that answers at once, in the clear and over TLS. One thread, epoll,
 * OpenSSL.
 *
 *     upstream CERTIFICATE KEY
 *
 * listens on two free ports of 127.0.0.1 and prints them: plain, then TLS. With keep-alive and any key:
 *
 *     GET  /v1/models                     about 4.6 KB of JSON
 *     POST /v1/chat/completions           a completion; or, if the body has "stream":true and "bench events=N
 *                                         interval=US size=BYTES", that many server-sent events and [DONE]
 *     POST /v1/files                      takes a body of any size and answers with its number of bytes
 *     GET  /v1/files/bench-SIZE/content   that many bytes
 *
 * Any of these paths with "?close" after it: the same with `Connection: close`, and X-Bench-Connection names
 * the kind of connection: "new" if the request was its first and its TLS session, if any, was resumed; else "reused", or
 * "new by a full handshake". The proxy closes the connection.
 *
 * No two answers have the same head: those of api.x.ai differ in the fields that are random here, too.
 *
 * Each event is sent in a write of its own, at its own time, stamped with CLOCK_MONOTONIC in nanoseconds.
 * Streams start at a random phase: events that came in bunches would cost a proxy half as much as those that
 * real streams bring. (That is why this is not nginx with Lua: its timers tick in milliseconds.)
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { IN_SIZE = 64 << 10, BODY_SIZE = 64 << 10, HEAD_SIZE = 2048, EVENT_SIZE = 16 << 10, BLOCK = 256 << 10 };

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static void check(int good, const char *what) {
    if (good) return;
    fprintf(stderr, "upstream: %s: %s\n", what, strerror(errno));
    ERR_print_errors_fp(stderr);
    exit(1);
}

/* ---- connections ---- */

enum expecting { HEAD, CONTENT, CHUNK_HEAD, CHUNK_DATA, CHUNK_END, TRAILER, NOTHING };

struct connection {
    int fd;
    SSL *ssl;                        /* NULL: in the clear */
    enum expecting expecting;        /* NOTHING while an answer is being sent */
    char method[8], path[128], *in, *body;
    long in_size, body_size, received, left;
    long requests;                   /* that came on it */
    int closing;                     /* the answer is the last on this connection */
    char *out;                       /* what the socket did not take; then `download` more bytes */
    long out_size, download;
    long events, sent_events, event_size;
    int64_t interval, begin, next;   /* ns; next: when the next event is due, the key of the heap */
    int place;                       /* in the heap; -1: not there */
};

static int epoll;
static char block[BLOCK];

static void watch(struct connection *connection, int operation, uint32_t wanted) {
    struct epoll_event event = {.events = wanted, .data.ptr = connection};
    epoll_ctl(epoll, operation, connection->fd, &event);
}

/* A heap of the connections that owe an event, the earliest on top. */
static struct connection **heap;
static int heap_size, heap_room;

static void place(struct connection *connection, int at) {
    while (at && heap[(at - 1) / 2]->next > connection->next) {
        heap[at] = heap[(at - 1) / 2];
        heap[at]->place = at;
        at = (at - 1) / 2;
    }
    for (int child; (child = 2 * at + 1) < heap_size; at = child) {
        if (child + 1 < heap_size && heap[child + 1]->next < heap[child]->next) child++;
        if (heap[child]->next >= connection->next) break;
        heap[at] = heap[child];
        heap[at]->place = at;
    }
    heap[at] = connection;
    connection->place = at;
}

static void schedule(struct connection *connection, int64_t time) {
    if (heap_size == heap_room) heap = realloc(heap, (heap_room = 2 * heap_room + 64) * sizeof *heap);
    connection->next = time;
    place(connection, heap_size++);
}

static void unschedule(struct connection *connection) {
    int at = connection->place;
    if (at < 0) return;
    connection->place = -1;
    if (at != --heap_size) place(heap[heap_size], at);
}

static void drop(struct connection *connection) {
    unschedule(connection);
    SSL_free(connection->ssl);
    close(connection->fd);
    free(connection->in);
    free(connection->body);
    free(connection->out);
    free(connection);
}

/* ---- bytes: 0 means later, -1 that the connection is at its end ---- */

static long outcome(struct connection *connection, int result) {
    if (result > 0) return result;
    if (!connection->ssl) return result < 0 && errno == EAGAIN ? 0 : -1;
    int error = SSL_get_error(connection->ssl, result);
    return error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE ? 0 : -1;
}

static long read_some(struct connection *connection, char *to, long size) {
    ERR_clear_error();
    return outcome(connection, connection->ssl ? SSL_read(connection->ssl, to, size)
                                               : recv(connection->fd, to, size, 0));
}

static long write_some(struct connection *connection, const char *from, long size) {
    ERR_clear_error();
    return outcome(connection, connection->ssl ? SSL_write(connection->ssl, from, size)
                                               : send(connection->fd, from, size, MSG_NOSIGNAL));
}

/* Sends what is owed: 1 when all has left, 0 when the rest waits for EPOLLOUT. */
static int flush(struct connection *connection) {
    long sent = 0, done = 0;
    while (done < connection->out_size &&
           (sent = write_some(connection, connection->out + done, connection->out_size - done)) > 0)
        done += sent;
    connection->out_size -= done;
    if (done && connection->out_size) memmove(connection->out, connection->out + done, connection->out_size);
    while (!connection->out_size && connection->download) {
        sent = write_some(connection, block, connection->download < BLOCK ? connection->download : BLOCK);
        if (sent <= 0) break;
        connection->download -= sent;
    }
    if (sent < 0) return -1;
    return !connection->out_size && !connection->download;
}

static int send_all(struct connection *connection, const char *data, long size) {
    long sent = connection->out_size ? 0 : write_some(connection, data, size);
    if (sent < 0) return -1;
    if (sent == size) return 1;
    connection->out = realloc(connection->out, connection->out_size + size - sent);
    memcpy(connection->out + connection->out_size, data + sent, size - sent);
    connection->out_size += size - sent;
    watch(connection, EPOLL_CTL_MOD, EPOLLIN | EPOLLRDHUP | EPOLLOUT);
    return 0;
}

/* ---- answers ---- */

static char models[8192], completion[4096];

static void prepare_answers(void) {
    char *end = models + sprintf(models, "{\"object\":\"list\",\"data\":[");
    for (int i = 0; i < 45; i++)
        end += sprintf(end, "%s{\"id\":\"grok-model-%02d\",\"object\":\"model\",\"created\":1700000000,"
                       "\"owned_by\":\"xai\",\"context_window\":131072}", i ? "," : "", i);
    strcpy(end, "]}");
    memset(block, 'z', sizeof block);
    sprintf(completion, "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1700000000,"
            "\"model\":\"grok-4\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\","
            "\"content\":\"%.1700s\"},\"finish_reason\":\"stop\"}],"
            "\"usage\":{\"prompt_tokens\":10,\"completion_tokens\":300,\"total_tokens\":310}}", block);
}

static uint64_t random_bits(void) { /* xorshift64 */
    static uint64_t state;
    if (!state) state = now();
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

static const char *kind(struct connection *connection) {
    if (connection->requests > 1) return "reused";
    return connection->ssl && !SSL_session_reused(connection->ssl) ? "new by a full handshake" : "new";
}

/* The fields are those of an answer of api.x.ai. Returns the head's size; length -1: chunked. */
static int answer_head(struct connection *connection, char *to, int status, const char *type, long length) {
    static unsigned count;
    static char date[64];
    static time_t dated;
    char framing[64] = "Transfer-Encoding: chunked", closing[80] = "";
    time_t seconds = time(NULL);
    uint64_t id = random_bits(), trace = random_bits(), metrics = random_bits(), ray = random_bits();
    if (dated != seconds) strftime(date, sizeof date, "%a, %d %b %Y %H:%M:%S GMT", gmtime(&seconds));
    dated = seconds;
    if (length >= 0) sprintf(framing, "Content-Length: %ld", length);
    if (connection->closing) sprintf(closing, "Connection: close\r\nX-Bench-Connection: %s\r\n", kind(connection));
    count++;
    return sprintf(to, "HTTP/1.1 %d %s\r\n"
                   "Date: %s\r\n"
                   "Content-Type: %s\r\n"
                   "%s\r\n"
                   "%s"
                   "Strict-Transport-Security: max-age=31536000\r\n"
                   "Server-Timing: cfCacheStatus;desc=\"DYNAMIC\"\r\n"
                   "x-ratelimit-limit-tokens: 50000000\r\n"
                   "x-ratelimit-remaining-tokens: %u\r\n"
                   "x-ratelimit-limit-requests: 7200\r\n"
                   "x-ratelimit-remaining-requests: %u\r\n"
                   "x-request-id: %08x-%04x-4c1e-9d2f-%012" PRIx64 "\r\n"
                   "x-zero-data-retention: false\r\n"
                   "x-data-retention: general\r\n"
                   "x-metrics-ttft-ms: %u.%u\r\n"
                   "x-metrics-mean-itl-ms: %u.%u\r\n"
                   "x-metrics-e2e-ms: %u.%u\r\n"
                   "traceparent: 00-%016" PRIx64 "%016" PRIx64 "-%016" PRIx64 "-01\r\n"
                   "vary: origin, access-control-request-method, access-control-request-headers\r\n"
                   "access-control-allow-origin: *\r\n"
                   "access-control-expose-headers: *\r\n"
                   "cf-cache-status: DYNAMIC\r\n"
                   "Set-Cookie: __cf_bm=%016" PRIx64 "%016" PRIx64 "; path=/; HttpOnly; Secure\r\n"
                   "Server: cloudflare\r\n"
                   "CF-RAY: %016" PRIx64 "-FRA\r\n\r\n",
                   status, status == 200 ? "OK" : "Not Found", date, type, framing, closing,
                   49999999 - count * 1999 % 40000000, 7199 - count % 7200,
                   (unsigned)id, (unsigned)(id >> 48), (id ^ trace) >> 16,
                   200 + (unsigned)(metrics & 255), (unsigned)(metrics >> 8 & 7),
                   5 + (unsigned)(metrics >> 11 & 15), (unsigned)(metrics >> 15 & 7),
                   900 + (unsigned)(metrics >> 18 & 4095), (unsigned)(metrics >> 30 & 7),
                   trace, id ^ ray, ray ^ metrics, ~trace, metrics, ray);
}

static int answer(struct connection *connection, int status, const char *body) {
    char whole[HEAD_SIZE + sizeof models];
    int size = answer_head(connection, whole, status, "application/json", strlen(body));
    return send_all(connection, whole, size + sprintf(whole + size, "%s", body));
}

static int send_event(struct connection *connection) {
    char event[EVENT_SIZE + 32], *data = event + 8; /* the chunk's size goes before it, once it is known */
    int size = sprintf(data, "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\","
                       "\"created\":1700000000,\"model\":\"grok-4\",\"choices\":[{\"index\":0,"
                       "\"delta\":{\"role\":\"assistant\",\"content\":\"T=%019lld ", (long long)now());
    static const char end[] = "\"},\"finish_reason\":null}]}\n\n\r\n";
    int padding = connection->event_size - size - (int)(sizeof end - 3); /* less NUL and the chunk's CR LF */
    if (padding > 0) memset(data + size, 'x', padding), size += padding;
    strcpy(data + size, end);
    size += sizeof end - 1;
    char head[16];
    int head_size = sprintf(head, "%x\r\n", size - 2);
    memcpy(data - head_size, head, head_size);
    return send_all(connection, data - head_size, size + head_size);
}

static int end_stream(struct connection *connection) {
    static const char end[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
    connection->events = 0;
    return send_all(connection, end, sizeof end - 1);
}

/* Sends the event that is due, or the end; then sets the time of the next. */
static int continue_stream(struct connection *connection) {
    if (connection->sent_events == connection->events) return end_stream(connection);
    int sent = send_event(connection);
    connection->sent_events++;
    if (sent > 0) schedule(connection, connection->begin + connection->sent_events * connection->interval);
    return sent; /* 0: on_writable goes on */
}

static int start_stream(struct connection *connection, const char *wish) {
    char head[HEAD_SIZE];
    long interval;
    if (sscanf(wish, "bench events=%ld interval=%ld size=%ld", &connection->events, &interval,
               &connection->event_size) != 3 ||
        connection->event_size > EVENT_SIZE || connection->events < 1)
        return answer(connection, 404, "{\"error\":\"no such stream\"}");
    connection->interval = interval * 1000;
    connection->sent_events = 0;
    connection->begin = now() - (interval ? random() % connection->interval : 0);
    int size = answer_head(connection, head, 200, "text/event-stream; charset=utf-8", -1);
    if (send_all(connection, head, size) < 0) return -1;
    return continue_stream(connection);
}

static int respond(struct connection *connection) {
    char text[HEAD_SIZE];
    const char *wish;
    if (!strcmp(connection->path, "/v1/models")) return answer(connection, 200, models);
    if (!strcmp(connection->path, "/v1/chat/completions")) {
        if (strstr(connection->body, "\"stream\":true") || strstr(connection->body, "\"stream\": true"))
            return start_stream(connection, (wish = strstr(connection->body, "bench events=")) ? wish : "");
        return answer(connection, 200, completion);
    }
    if (!strcmp(connection->path, "/v1/files")) {
        sprintf(text, "{\"id\":\"file-1\",\"object\":\"file\",\"bytes\":%ld}", connection->received);
        return answer(connection, 200, text);
    }
    if (sscanf(connection->path, "/v1/files/bench-%ld/content", &connection->download) == 1) {
        connection->out = realloc(connection->out, HEAD_SIZE);
        connection->out_size = answer_head(connection, connection->out, 200, "application/octet-stream",
                                           connection->download);
        int sent = flush(connection);
        if (!sent) watch(connection, EPOLL_CTL_MOD, EPOLLIN | EPOLLRDHUP | EPOLLOUT);
        return sent;
    }
    return answer(connection, 404, "{\"error\":\"not found\"}");
}

/* ---- requests ---- */

static int take_head(struct connection *connection, char *head) {
    char *chunked = strcasestr(head, "\r\ntransfer-encoding: chunked");
    char *length = strcasestr(head, "\r\ncontent-length:");
    if (sscanf(head, "%7s %127s", connection->method, connection->path) != 2) return -1;
    char *query = strstr(connection->path, "?close");
    if ((connection->closing = query != NULL)) *query = 0;
    connection->requests++;
    connection->received = connection->body_size = 0;
    connection->body[0] = 0;
    connection->left = length ? atol(length + strlen("\r\ncontent-length:")) : 0;
    connection->expecting = chunked ? CHUNK_HEAD : connection->left ? CONTENT : NOTHING;
    if (!strcasestr(head, "\r\nexpect: 100-continue")) return 0;
    return send_all(connection, "HTTP/1.1 100 Continue\r\n\r\n", 25);
}

static void take_body(struct connection *connection, const char *data, long size) {
    connection->received += size;
    if (!strcmp(connection->path, "/v1/files")) return;
    if (size >= BODY_SIZE - connection->body_size) size = BODY_SIZE - 1 - connection->body_size;
    memcpy(connection->body + connection->body_size, data, size);
    connection->body[connection->body_size += size] = 0;
}

/* Takes what has come of one request; when that is all, expecting is NOTHING. -1: cannot be understood. */
static int parse(struct connection *connection) {
    char *at = connection->in, *end = at + connection->in_size, *line;
    while (at < end && connection->expecting != NOTHING) {
        if (connection->expecting == CONTENT || connection->expecting == CHUNK_DATA) {
            long size = end - at < connection->left ? end - at : connection->left;
            take_body(connection, at, size);
            at += size;
            if (!(connection->left -= size))
                connection->expecting = connection->expecting == CONTENT ? NOTHING : CHUNK_END;
            continue;
        }
        const char *delimiter = connection->expecting == HEAD ? "\r\n\r\n" : "\r\n";
        if (!(line = memmem(at, end - at, delimiter, strlen(delimiter)))) break;
        if (connection->expecting == HEAD) {
            *line = 0;
            if (take_head(connection, at) < 0) return -1;
        } else if (connection->expecting == CHUNK_HEAD) {
            connection->left = strtol(at, NULL, 16);
            connection->expecting = connection->left ? CHUNK_DATA : TRAILER;
        } else if (connection->expecting == CHUNK_END) {
            connection->expecting = CHUNK_HEAD;
        } else if (line == at) { /* the empty line after the trailer */
            connection->expecting = NOTHING;
        }
        at = line + strlen(delimiter);
    }
    connection->in_size = end - at;
    if (connection->in_size == IN_SIZE) return -1;
    memmove(connection->in, at, connection->in_size);
    return 0;
}

static int idle(struct connection *connection) {
    return !connection->out_size && !connection->download && !connection->events;
}

/* Answers every request that has come whole, one after the other. */
static int serve(struct connection *connection) {
    for (;;) {
        if (connection->expecting == NOTHING) {
            if (!idle(connection)) return 0;
            connection->expecting = HEAD;
        }
        if (parse(connection) < 0) return -1;
        if (connection->expecting != NOTHING) return 0;
        if (respond(connection) < 0) return -1;
    }
}

static int on_readable(struct connection *connection) {
    long size;
    do { /* while there may be more. A TLS record fits whole: nothing is left where epoll cannot see it */
        if (connection->in_size == IN_SIZE) return 0; /* pipelined requests, which wait */
        size = read_some(connection, connection->in + connection->in_size, IN_SIZE - connection->in_size);
        if (size < 0) return -1;
        connection->in_size += size;
        if (size && serve(connection) < 0) return -1;
    } while (size >= 8 << 10);
    return 0;
}

static int on_writable(struct connection *connection) {
    int sent = flush(connection);
    if (sent <= 0) return sent;
    watch(connection, EPOLL_CTL_MOD, EPOLLIN | EPOLLRDHUP);
    if (connection->events && connection->place < 0)
        schedule(connection, connection->begin + connection->sent_events * connection->interval);
    return serve(connection);
}

static int on_event(struct connection *connection, uint32_t happened) {
    if (happened & (EPOLLHUP | EPOLLERR)) return -1;
    if ((happened & EPOLLRDHUP) && !idle(connection)) return -1;
    if ((happened & EPOLLOUT) && on_writable(connection) < 0) return -1;
    return happened & EPOLLIN ? on_readable(connection) : 0; /* SSL_read does the handshake, too */
}

/* ---- the server ---- */

static int listen_on_any_port(int *port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    check(!bind(fd, (struct sockaddr *)&address, sizeof address) && !listen(fd, 4096), "listen");
    getsockname(fd, (struct sockaddr *)&address, &size);
    *port = ntohs(address.sin_port);
    return fd;
}

static void accept_all(int listener, SSL_CTX *tls) {
    struct linger reset = {.l_onoff = 1};
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        struct connection *connection = calloc(1, sizeof *connection);
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        /* A proxy's FIN is answered with RST: no connection stays in TIME_WAIT and slows down those of the next run. */
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
        connection->fd = fd;
        connection->place = -1;
        connection->in = malloc(IN_SIZE);
        connection->body = malloc(BODY_SIZE);
        if (tls) {
            connection->ssl = SSL_new(tls);
            SSL_set_fd(connection->ssl, fd);
            SSL_set_accept_state(connection->ssl);
        }
        watch(connection, EPOLL_CTL_ADD, EPOLLIN | EPOLLRDHUP);
    }
}

static SSL_CTX *tls_context(const char *certificate, const char *key) {
    SSL_CTX *context = SSL_CTX_new(TLS_server_method());
    check(SSL_CTX_use_certificate_chain_file(context, certificate) == 1 &&
          SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) == 1, certificate);
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER |
                              SSL_MODE_RELEASE_BUFFERS);
    SSL_CTX_set_options(context, SSL_OP_IGNORE_UNEXPECTED_EOF);
    /* A resumed handshake of TLS 1.2 has no key exchange and costs half: a proxy must not gain by an old version. */
    SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
    return context;
}

int main(int count, char **arguments) {
    struct { int port, fd; SSL_CTX *tls; } listeners[2] = {0};
    struct epoll_event happened[256];
    struct rlimit files;
    check(count == 3, "upstream CERTIFICATE KEY");
    signal(SIGPIPE, SIG_IGN);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    prepare_answers();
    epoll = epoll_create1(0);
    listeners[1].tls = tls_context(arguments[1], arguments[2]);
    for (int i = 0; i < 2; i++) {
        listeners[i].fd = listen_on_any_port(&listeners[i].port);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &listeners[i]};
        epoll_ctl(epoll, EPOLL_CTL_ADD, listeners[i].fd, &event);
    }
    printf("%d %d\n", listeners[0].port, listeners[1].port);
    fflush(stdout);
    for (;;) {
        int64_t wait = heap_size ? heap[0]->next - now() : 1000000000;
        struct timespec timeout = {wait > 0 ? wait / 1000000000 : 0, wait > 0 ? wait % 1000000000 : 0};
        int ready = epoll_pwait2(epoll, happened, 256, &timeout, NULL);
        for (int i = 0; i < ready; i++) {
            if (happened[i].data.ptr == &listeners[0] || happened[i].data.ptr == &listeners[1]) {
                int which = happened[i].data.ptr == &listeners[1];
                accept_all(listeners[which].fd, listeners[which].tls);
            } else if (on_event(happened[i].data.ptr, happened[i].events) < 0) {
                drop(happened[i].data.ptr);
            }
        }
        int64_t time = now();
        for (int due = 0; due < 1024 && heap_size && heap[0]->next <= time; due++) {
            struct connection *connection = heap[0];
            unschedule(connection);
            if (continue_stream(connection) < 0 || (idle(connection) && serve(connection) < 0))
                drop(connection);
        }
    }
}

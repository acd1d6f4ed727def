// The benchmark's reverse proxy in Go: net/http/httputil, one CPU, no access log.
//
//	reverse_proxy UPSTREAM CERTIFICATE TOKEN
//
// listens on a free port of 127.0.0.1 and prints it. It does what the benchmark's nginx configuration does.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"runtime"
	"sync"
)

// A request body that still returns io.EOF after it was closed. Go's server closes it when the response begins. If
// Transport checks only then that nothing follows the body, it takes any other error for a broken request and closes
// the upstream connection in the middle of the response.
type requestBody struct {
	io.ReadCloser
	ended bool
}

func (body *requestBody) Read(buffer []byte) (int, error) {
	if body.ended {
		return 0, io.EOF
	}
	size, err := body.ReadCloser.Read(buffer)
	body.ended = err == io.EOF
	return size, err
}

type bufferPool struct{ sync.Pool }

func (pool *bufferPool) Get() []byte       { return *pool.Pool.Get().(*[]byte) }
func (pool *bufferPool) Put(buffer []byte) { pool.Pool.Put(&buffer) }

func newBuffer() any {
	buffer := make([]byte, 32<<10)
	return &buffer
}

func must[T any](value T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return value
}

func main() {
	runtime.GOMAXPROCS(1)
	upstream, token := must(url.Parse(os.Args[1])), os.Args[3]
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(must(os.ReadFile(os.Args[2])))
	proxy := &httputil.ReverseProxy{
		FlushInterval: -1,
		BufferPool:    &bufferPool{sync.Pool{New: newBuffer}},
		Director: func(request *http.Request) {
			request.URL.Scheme, request.URL.Host, request.Host = upstream.Scheme, upstream.Host, "localhost"
			request.Header.Set("Authorization", "Bearer "+token)
			if request.Body != nil {
				request.Body = &requestBody{ReadCloser: request.Body}
			}
			request.Header["X-Forwarded-For"] = nil // nil: ReverseProxy adds none
		},
		Transport: &http.Transport{
			TLSClientConfig: &tls.Config{
				RootCAs:            roots,
				ServerName:         "localhost",
				MinVersion:         tls.VersionTLS13,
				ClientSessionCache: tls.NewLRUClientSessionCache(0),
			},
			MaxIdleConnsPerHost: 8000,
			DisableCompression:  true,
		},
	}
	listener := must(net.Listen("tcp", "127.0.0.1:0"))
	fmt.Println("listening on", listener.Addr())
	log.Fatal(http.Serve(listener, proxy))
}

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
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"runtime"
	"sync"
)

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

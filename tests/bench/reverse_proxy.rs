//! The benchmark's reverse proxy in Rust: hyper and rustls, one thread, no access log.
//!
//!     reverse_proxy UPSTREAM CERTIFICATE TOKEN
//!
//! listens on a free port of 127.0.0.1 and prints it. It does what the benchmark's nginx configuration does.
use hyper::client::HttpConnector;
use hyper::header::{HeaderName, HeaderValue, AUTHORIZATION, CONNECTION, HOST, TE, TRAILER, UPGRADE};
use hyper::service::{make_service_fn, service_fn};
use hyper::{Body, Client, Request, Response, Server, StatusCode, Uri};
use rustls::{version::TLS13, Certificate, ClientConfig, RootCertStore};
use std::{env, error::Error, fs::File, io::BufReader};

const HOP_BY_HOP: [HeaderName; 4] = [CONNECTION, TE, TRAILER, UPGRADE];

fn tls_config(certificate: &str) -> Result<ClientConfig, Box<dyn Error>> {
    let mut roots = RootCertStore::empty();
    for der in rustls_pemfile::certs(&mut BufReader::new(File::open(certificate)?))? {
        roots.add(&Certificate(der))?;
    }
    let config = ClientConfig::builder().with_safe_default_cipher_suites().with_safe_default_kx_groups();
    Ok(config.with_protocol_versions(&[&TLS13])?.with_root_certificates(roots).with_no_client_auth())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().collect();
    let upstream: Uri = arguments[1].parse()?;
    let authorization: HeaderValue = format!("Bearer {}", arguments[3]).parse()?;
    let mut http = HttpConnector::new();
    http.set_nodelay(true);
    http.enforce_http(false);
    let connector = hyper_rustls::HttpsConnectorBuilder::new()
        .with_tls_config(tls_config(&arguments[2])?)
        .https_or_http()
        .with_server_name("localhost".to_string())
        .enable_http1()
        .wrap_connector(http);
    let client: Client<_, Body> = Client::builder().build(connector);
    let forward = move |mut request: Request<Body>| {
        let mut to = upstream.clone().into_parts();
        to.path_and_query = request.uri().path_and_query().cloned();
        *request.uri_mut() = Uri::from_parts(to).unwrap();
        let headers = request.headers_mut();
        HOP_BY_HOP.iter().for_each(|name| drop(headers.remove(name)));
        headers.insert(HOST, HeaderValue::from_static("localhost"));
        headers.insert(AUTHORIZATION, authorization.clone());
        let exchange = client.request(request);
        async {
            Ok::<_, hyper::Error>(exchange.await.map_or_else(bad_gateway, |mut response| {
                response.headers_mut().remove(CONNECTION);
                response
            }))
        }
    };
    let service = make_service_fn(move |_| {
        let forward = forward.clone();
        async { Ok::<_, hyper::Error>(service_fn(forward)) }
    });
    let server = Server::bind(&([127, 0, 0, 1], 0).into()).tcp_nodelay(true).serve(service);
    println!("listening on {}", server.local_addr());
    Ok(server.await?)
}

fn bad_gateway(error: hyper::Error) -> Response<Body> {
    eprintln!("{error}");
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::BAD_GATEWAY;
    response
}

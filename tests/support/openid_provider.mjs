// An OpenID provider, and an API that takes its access tokens: a line of JSON with their addresses is printed at the
// start. Arguments: a folder in which npm has installed oidc-provider, and the client's ID.

import {createServer} from "node:http";
import {pathToFileURL} from "node:url";

const [folder, client] = process.argv.slice(2);
const {default: Provider} = await import(pathToFileURL(`${folder}/node_modules/oidc-provider/lib/index.js`));

const listen = server => new Promise(resolve =>
  server.listen(0, "127.0.0.1", () => resolve(`http://127.0.0.1:${server.address().port}`)));

const issuerServer = createServer(), issuer = await listen(issuerServer);
const provider = new Provider(issuer, {
  clients: [{
    client_id: client,
    token_endpoint_auth_method: "none",
    application_type: "native",
    redirect_uris: ["http://127.0.0.1/callback"],
    grant_types: ["authorization_code", "refresh_token", "urn:ietf:params:oauth:grant-type:device_code"],
  }],
  claims: {openid: ["sub"], email: ["email"]},
  // Otherwise the address would be at the userinfo endpoint alone.
  conformIdTokenClaims: false,
  findAccount: (_context, id) => ({accountId: id, claims: () => ({sub: id, email: `${id}@example.org`})}),
  features: {deviceFlow: {enabled: true}, revocation: {enabled: true}, devInteractions: {enabled: true}},
});
issuerServer.on("request", provider.callback());

// RFC 6750: a token that the provider does not know gets 401 with invalid_token.
const api = createServer(async ({headers, method, url}, response) => {
  const [scheme, value] = (headers.authorization ?? "").split(" ");
  const token = scheme === "Bearer" && await provider.AccessToken.find(value);
  const send = (status, body, more = {}) => {
    response.writeHead(status, {"content-type": "application/json", ...more});
    response.end(JSON.stringify(body));
  };
  if (!token)
    return send(401, {message: "no valid token"}, {"www-authenticate": 'Bearer realm="api", error="invalid_token"'});
  if (url === "/v1/forbidden")
    return send(403, {message: "The credentials could not be validated for this."});
  if (url === "/v1/revoke") await token.destroy();
  send(url === "/v1/models" ? 404 : 200, {account: token.accountId, method, url, headers: Object.keys(headers)});
});

console.log(JSON.stringify({issuer, api: await listen(api)}));

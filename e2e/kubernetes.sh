#!/bin/bash
# The operator on a real cluster. Never run by CI. It says what it does, step by step:
#
#   e2e/kubernetes.sh                     a kind cluster "glowplug" is made, used and deleted
#   CONTEXT=current e2e/kubernetes.sh     kubectl's current context, where it makes and deletes the namespace
#                                         glowplug-serving and the definition of ModelEndpoints
#   IMAGE=registry.example/glowplug-serving:0.1    built and loaded (kind) or pushed (otherwise)
#   KEEP=1                                leaves everything as it is at the end
#
# Needs docker, kubectl, openssl, curl, and kind for the first form. An endpoint of two small servers is made,
# asked, scaled, updated, deleted; whatever is not as it should be ends the script with a word on it.
set -euo pipefail

context=${CONTEXT:-kind}
image=${IMAGE:-glowplug-serving:e2e}
engine=${ENGINE_IMAGE:-python:3.12-slim}
namespace=glowplug-serving
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
forward=

say() { printf '== %s\n' "$*" >&2; }
fail() { say "NOT SO: $*"; kubectl -n "$namespace" describe mep >&2 || true; exit 1; }
clean() {
    [ -z "$forward" ] || kill "$forward" 2>/dev/null || true
    rm -rf "$work"
    [ -z "${KEEP:-}" ] || return 0
    if [ "$context" = kind ]; then kind delete cluster --name glowplug
    else kubectl delete -k "$root/deploy/kustomize/serving" --ignore-not-found --wait=false; fi
}
trap clean EXIT

say "the image $image"
docker build --target serving -t "$image" "$root"
if [ "$context" = kind ]; then
    say "a kind cluster"
    kind create cluster --name glowplug
    kind load docker-image --name glowplug "$image"
else
    say "the cluster of the context $(kubectl config current-context)"
    docker push "$image"
fi

say "the operator and its Envoys"
mkdir "$work/overlay"
cat >"$work/overlay/kustomization.yaml" <<END
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [../serving]
images: [{name: glowplug-serving, newName: "${image%:*}", newTag: "${image##*:}"}]
END
cp -r "$root/deploy/kustomize/serving" "$work/serving"
kubectl apply -f "$work/serving/namespace.yaml"

say "a CA and two certificates, in Secrets"
openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=glowplug-e2e \
    -keyout "$work/ca.key" -out "$work/ca.crt" 2>/dev/null
for name in xds:glowplug-operator envoy:glowplug-envoy; do
    openssl req -newkey rsa:2048 -nodes -subj "/CN=${name#*:}" \
        -keyout "$work/tls.key" -out "$work/request" 2>/dev/null
    openssl x509 -req -in "$work/request" -days 30 -CA "$work/ca.crt" -CAkey "$work/ca.key" -CAcreateserial \
        -extfile <(echo "subjectAltName=DNS:${name#*:}") -out "$work/tls.crt" 2>/dev/null
    kubectl -n "$namespace" create secret generic "glowplug-${name%%:*}" --dry-run=client -o yaml \
        --from-file="$work/tls.crt" --from-file="$work/tls.key" --from-file="$work/ca.crt" | kubectl apply -f -
done
kubectl apply -k "$work/overlay"
kubectl wait --for=condition=Established crd/modelendpoints.glowplug.dev --timeout=60s
kubectl -n "$namespace" rollout status deployment/glowplug-operator --timeout=300s
kubectl -n "$namespace" rollout status deployment/glowplug-envoy --timeout=300s

endpoint() {
    kubectl apply -f - <<END
apiVersion: glowplug.dev/v1alpha1
kind: ModelEndpoint
metadata: {name: hello, namespace: $namespace}
spec:
  image: $engine
  engine:
    kind: command
    command: ["sh", "-c", "mkdir -p /tmp/w && cd /tmp/w && echo $1 >health && exec python3 -m http.server \$PORT"]
  replicas: {min: 2, max: 4}
  autoscaling: {mode: "off"}
  routing: {port: 8080}
  drain: {notice_seconds: 2, seconds: 10}
  update: {steps_percent: [50, 100], step_seconds: 3}
  kubernetes: {supervisor: $image}
END
}
answers() { curl -fsS --max-time 5 "http://127.0.0.1:18080/health" 2>/dev/null; }
until_is() { # JSONPATH VALUE
    kubectl -n "$namespace" wait mep/hello --for=jsonpath="$1=$2" --timeout=300s || fail "$1 is not $2"
}

say "an endpoint of two replicas"
endpoint one
until_is '{.status.readyReplicas}' 2
kubectl -n "$namespace" port-forward service/hello 18080:80 >/dev/null &
forward=$!
for _ in $(seq 60); do answers >/dev/null && break || sleep 1; done
[ "$(answers)" = one ] || fail "a request gets 'one'"

say "three, by the scale subresource"
kubectl -n "$namespace" scale mep hello --replicas 3
until_is '{.status.readyReplicas}' 3

say "a document that is wrong is refused, and nothing changes"
kubectl -n "$namespace" patch mep hello --type merge -p '{"spec":{"replicas":{"min":9}}}'
kubectl -n "$namespace" wait mep/hello --for=condition=Valid=false --timeout=60s || fail "Valid is False"
[ "$(answers)" = one ] || fail "a request still gets 'one'"

say "an update, while requests go on"
(failed=0; for _ in $(seq 200); do answers >/dev/null || failed=$((failed + 1)); sleep 0.1; done
    echo "$failed" >"$work/failed") &
load=$!
endpoint two
until_is '{.status.phase}' shifting
until_is '{.status.phase}' steady
wait "$load"
[ "$(answers)" = two ] || fail "a request gets 'two'"
say "requests that failed meanwhile: $(cat "$work/failed")"

say "deleted, with all that was made for it"
kubectl -n "$namespace" delete mep hello --timeout=120s
for _ in $(seq 30); do
    left=$(kubectl -n "$namespace" get deployment,pod,secret,configmap -l glowplug.dev/endpoint=hello -o name)
    [ -n "$left" ] || break
    sleep 1
done
[ -z "$left" ] || fail "nothing is left: $left"
say "all of it works"

{{- define "unmask-inference.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- /* Name of every object. */ -}}
{{- define "unmask-inference.fullname" -}}
{{- $name := include "unmask-inference.name" . -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "unmask-inference.serviceAccountName" -}}
{{- default (ternary (include "unmask-inference.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name }}
{{- end }}

{{- /* Labels that never change, for selectors. */ -}}
{{- define "unmask-inference.selectorLabels" -}}
app.kubernetes.io/name: {{ include "unmask-inference.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: engine
{{- end }}

{{- define "unmask-inference.gatewaySelectorLabels" -}}
{{- merge (dict "app.kubernetes.io/component" "gateway") (include "unmask-inference.selectorLabels" . | fromYaml) | toYaml }}
{{- end }}

{{- /* No version among them: a new chart alone is no reason to start pods anew. */ -}}
{{- define "unmask-inference.podLabels" -}}
{{- toYaml (merge (include "unmask-inference.selectorLabels" . | fromYaml) .Values.podLabels .Values.commonLabels) }}
{{- end }}

{{- define "unmask-inference.gatewayPodLabels" -}}
{{- toYaml (merge (include "unmask-inference.gatewaySelectorLabels" . | fromYaml) .Values.podLabels .Values.commonLabels) }}
{{- end }}

{{- define "unmask-inference.gatewayLabels" -}}
{{- merge (dict "app.kubernetes.io/component" "gateway") (include "unmask-inference.labels" . | fromYaml) | toYaml }}
{{- end }}

{{- define "unmask-inference.labels" -}}
{{- $labels := dict
  "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-")
  "app.kubernetes.io/version" .Chart.AppVersion
  "app.kubernetes.io/part-of" "unmask"
  "app.kubernetes.io/managed-by" .Release.Service -}}
{{- $labels = merge (include "unmask-inference.selectorLabels" . | fromYaml) $labels .Values.commonLabels -}}
{{- toYaml $labels }}
{{- end }}

{{- /* registry/repository:tag or registry/repository@digest, from (dict "image" ... "Chart" ...). */ -}}
{{- define "unmask-inference.image" -}}
{{- with .image.registry }}{{ . }}/{{ end -}}
{{- .image.repository }}
{{- with .image.digest }}@{{ . }}{{ else }}:{{ default .Chart.AppVersion .image.tag }}{{ end -}}
{{- end }}

{{- /* Name of the claim in `model.uri`. */ -}}
{{- define "unmask-inference.claim" -}}
{{- $uri := required "model.uri: has to be given, as pvc://NAME/path: a folder in a PersistentVolumeClaim of this namespace" .Values.model.uri -}}
{{- if regexMatch "(^|/)[.][.](/|$)" (trimPrefix "pvc://" $uri) -}}
{{- fail (printf "model.uri: got %s, the path leaves the volume; drop the '..'" $uri) -}}
{{- end -}}
{{- regexReplaceAll "/.*" (trimPrefix "pvc://" $uri) "" -}}
{{- end }}

{{- /* The model's folder in the container. */ -}}
{{- define "unmask-inference.folder" -}}
{{- $claim := include "unmask-inference.claim" . -}}
{{- printf "/volumes/%s" (trimPrefix "pvc://" .Values.model.uri | trimSuffix "/") -}}
{{- end }}

{{- /* What engines and gateways do about TLS; of an operator's engines, what the spec says. As YAML. */ -}}
{{- define "unmask-inference.tls" -}}
{{- if .Values.standalone -}}
{{- pick .Values.tls "enabled" "clientCASecretName" "clientCAKey" "allow" | toYaml -}}
{{- else -}}
{{- $tls := dig "server" "tls" nil (default dict .Values.spec) -}}
{{- $given := default dict $tls -}}
{{- dict "enabled" (not (empty $tls)) "clientCASecretName" (get $given "clientCaSecretName") "clientCAKey" (default "ca.crt" (get $given "clientCaKey")) "allow" (default list (get $given "allow")) | toYaml -}}
{{- end -}}
{{- end }}

{{- /* Secret with the engine's certificate. */ -}}
{{- define "unmask-inference.tlsSecret" -}}
{{- if not .Values.standalone -}}
{{- .Values.spec.server.tls.secretName -}}
{{- else -}}
{{- if not (or .Values.tls.secretName .Values.tls.certManager.issuerRef.name) -}}
{{- fail "tls.secretName: has to be given with tls.enabled; or have cert-manager make it, with tls.certManager.issuerRef.name" -}}
{{- end -}}
{{- if and .Values.tls.allow (not .Values.tls.clientCASecretName) -}}
{{- fail "tls.allow: clients that show no certificate have no names; give tls.clientCASecretName, too" -}}
{{- end -}}
{{- default (printf "%s-tls" (include "unmask-inference.fullname" .)) .Values.tls.secretName -}}
{{- end -}}
{{- end }}

{{- /* Secret with the gateway's certificate. */ -}}
{{- define "unmask-inference.gatewayTlsSecret" -}}
{{- $own := ternary (printf "%s-gateway-tls" (include "unmask-inference.fullname" .)) (include "unmask-inference.tlsSecret" .) (not (empty .Values.tls.certManager.issuerRef.name)) -}}
{{- default $own .Values.gateway.tlsSecretName -}}
{{- end }}

{{- /* What the gRPC port speaks; that TLS is on changes what is the default. */ -}}
{{- define "unmask-inference.appProtocol" -}}
{{- if and (include "unmask-inference.tls" . | fromYaml).enabled (eq .Values.service.appProtocol "kubernetes.io/h2c") -}}
https
{{- else -}}
{{ .Values.service.appProtocol }}
{{- end -}}
{{- end }}

{{- /* How a probe asks, from (dict "tls" ... "service" ... "port" ...): the cluster's probes of gRPC speak no TLS. */ -}}
{{- define "unmask-inference.probe" -}}
{{- if .tls.enabled -}}
httpGet: {path: {{ ternary "/healthz" "/livez" (hasKey . "service") }}, port: metrics}
{{- else -}}
grpc: {port: {{ default 50051 .port }}{{ with .service }}, service: {{ . }}{{ end }}}
{{- end -}}
{{- end }}

{{- /* Port at which engines take requests. */ -}}
{{- define "unmask-inference.enginePort" -}}
{{- ternary 50051 (dig "server" "port" 50051 (default dict .Values.spec)) .Values.standalone -}}
{{- end }}

{{- /* Labels of engines' pods, by which other objects find them. */ -}}
{{- define "unmask-inference.engineLabels" -}}
{{- if .Values.standalone -}}
{{- include "unmask-inference.selectorLabels" . -}}
{{- else -}}
unmask.dev/service: {{ include "unmask-inference.fullname" . }}
unmask.dev/role: engine
{{- end -}}
{{- end }}

{{- /* Name of the Service that gives the addresses of all engines. */ -}}
{{- define "unmask-inference.engines" -}}
{{- printf "%s-%s" (include "unmask-inference.fullname" .) (ternary "headless" "engines" .Values.standalone) -}}
{{- end }}

{{- /* Nothing that somebody asks for may be passed over in silence. */ -}}
{{- define "unmask-inference.check" -}}
{{- if .Values.standalone -}}
{{- if .Values.spec -}}
{{- fail "spec: got one, and it is for standalone=false; set that, or say the same with the other values" -}}
{{- end -}}
{{- else -}}
{{- if not (dig "model" "" (default dict .Values.spec)) -}}
{{- fail "spec.model: has to be given with standalone=false, as {uri: pvc://NAME/path} or {job: {name: NAME}}" -}}
{{- end -}}
{{- range $path, $default := include "unmask-inference.standaloneValues" . | fromJson -}}
{{- $value := $.Values -}}
{{- range splitList "." $path -}}
{{- $value = get $value . -}}
{{- end -}}
{{- /* What is null by default is not there at all. */ -}}
{{- if not (or (eq (toJson $value) (toJson $default)) (and (kindIs "invalid" $default) (empty $value))) -}}
{{- fail (printf "%s: got %s, and says nothing with standalone=false; drop it, and say it in spec" $path (toJson $value)) -}}
{{- end -}}
{{- end -}}
{{- if gt (len (include "unmask-inference.fullname" .)) 40 -}}
{{- fail (printf "fullnameOverride: a service's name has at most 40 characters, and %s has %d; give a shorter one" (include "unmask-inference.fullname" .) (len (include "unmask-inference.fullname" .))) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "unmask-inference.graceSeconds" -}}
{{- with .Values.termination }}{{ add .preStopSeconds .drainSeconds .reserveSeconds }}{{ end -}}
{{- end }}

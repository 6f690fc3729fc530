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

{{- /* Secret with the engine's certificate. */ -}}
{{- define "unmask-inference.tlsSecret" -}}
{{- if not (or .Values.tls.secretName .Values.tls.certManager.issuerRef.name) -}}
{{- fail "tls.secretName: has to be given with tls.enabled; or have cert-manager make it, with tls.certManager.issuerRef.name" -}}
{{- end -}}
{{- if and .Values.tls.allow (not .Values.tls.clientCASecretName) -}}
{{- fail "tls.allow: clients that show no certificate have no names; give tls.clientCASecretName, too" -}}
{{- end -}}
{{- default (printf "%s-tls" (include "unmask-inference.fullname" .)) .Values.tls.secretName -}}
{{- end }}

{{- /* Secret with the gateway's certificate. */ -}}
{{- define "unmask-inference.gatewayTlsSecret" -}}
{{- $own := ternary (printf "%s-gateway-tls" (include "unmask-inference.fullname" .)) (include "unmask-inference.tlsSecret" .) (not (empty .Values.tls.certManager.issuerRef.name)) -}}
{{- default $own .Values.gateway.tlsSecretName -}}
{{- end }}

{{- /* What the gRPC port speaks; that TLS is on changes what is the default. */ -}}
{{- define "unmask-inference.appProtocol" -}}
{{- if and .Values.tls.enabled (eq .Values.service.appProtocol "kubernetes.io/h2c") -}}
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

{{- define "unmask-inference.graceSeconds" -}}
{{- with .Values.termination }}{{ add .preStopSeconds .drainSeconds .reserveSeconds }}{{ end -}}
{{- end }}

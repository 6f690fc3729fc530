{{- define "unmask-operator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- /* Name of every object, and of the Lease. */ -}}
{{- define "unmask-operator.fullname" -}}
{{- $name := include "unmask-operator.name" . -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "unmask-operator.serviceAccountName" -}}
{{- default (ternary (include "unmask-operator.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name }}
{{- end }}

{{- /* Labels that never change, for selectors. */ -}}
{{- define "unmask-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ include "unmask-operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- /* No version among them: a new chart alone is no reason to start pods anew. */ -}}
{{- define "unmask-operator.podLabels" -}}
{{- toYaml (merge (include "unmask-operator.selectorLabels" . | fromYaml) .Values.podLabels .Values.commonLabels) }}
{{- end }}

{{- define "unmask-operator.labels" -}}
{{- $labels := dict
  "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-")
  "app.kubernetes.io/version" .Chart.AppVersion
  "app.kubernetes.io/part-of" "unmask"
  "app.kubernetes.io/managed-by" .Release.Service -}}
{{- $labels = merge (include "unmask-operator.selectorLabels" . | fromYaml) $labels .Values.commonLabels -}}
{{- toYaml $labels }}
{{- end }}

{{- /* registry/repository:tag or registry/repository@digest, from (dict "image" ... "Chart" ...). */ -}}
{{- define "unmask-operator.image" -}}
{{- with .image.registry }}{{ . }}/{{ end -}}
{{- .image.repository }}
{{- with .image.digest }}@{{ . }}{{ else }}:{{ default .Chart.AppVersion .image.tag }}{{ end -}}
{{- end }}

{{- /* Made by `make generate` from operator/src/unmask_operator/rbac.py; change that. */ -}}

{{- define "unmask-operator.rules" -}}
- apiGroups:
  - ''
  resources:
  - configmaps
  verbs:
  - create
  - delete
  - get
  - list
  - patch
  - watch
- apiGroups:
  - ''
  resources:
  - pods
  verbs:
  - list
  - watch
- apiGroups:
  - ''
  resources:
  - services
  verbs:
  - create
  - delete
  - get
  - list
  - patch
  - watch
- apiGroups:
  - apps
  resources:
  - controllerrevisions
  verbs:
  - create
  - delete
  - get
  - list
  - patch
  - watch
- apiGroups:
  - apps
  resources:
  - statefulsets
  verbs:
  - create
  - delete
  - get
  - list
  - patch
  - watch
- apiGroups:
  - autoscaling
  resources:
  - horizontalpodautoscalers
  verbs:
  - create
  - delete
  - get
  - list
  - patch
  - watch
- apiGroups:
  - batch
  resources:
  - jobs
  verbs:
  - create
  - delete
  - get
  - list
  - patch
  - watch
- apiGroups:
  - discovery.k8s.io
  resources:
  - endpointslices
  verbs:
  - list
  - watch
- apiGroups:
  - events.k8s.io
  resources:
  - events
  verbs:
  - create
  - list
  - patch
  - watch
- apiGroups:
  - networking.k8s.io
  resources:
  - networkpolicies
  verbs:
  - create
  - delete
  - get
  - list
  - patch
  - watch
- apiGroups:
  - policy
  resources:
  - poddisruptionbudgets
  verbs:
  - create
  - delete
  - get
  - list
  - patch
  - watch
- apiGroups:
  - scheduling.k8s.io
  resources:
  - podgroups
  verbs:
  - create
  - delete
  - get
  - list
  - patch
  - watch
- apiGroups:
  - unmask.dev
  resources:
  - diffusioninferenceservices
  verbs:
  - list
  - watch
- apiGroups:
  - unmask.dev
  resources:
  - diffusioninferenceservices/finalizers
  verbs:
  - update
- apiGroups:
  - unmask.dev
  resources:
  - diffusioninferenceservices/status
  verbs:
  - patch
- apiGroups:
  - unmask.dev
  resources:
  - diffusiontrainjobs
  verbs:
  - delete
  - list
  - watch
- apiGroups:
  - unmask.dev
  resources:
  - diffusiontrainjobs/finalizers
  verbs:
  - update
- apiGroups:
  - unmask.dev
  resources:
  - diffusiontrainjobs/status
  verbs:
  - patch
{{- end }}

{{- define "unmask-operator.leaseRules" -}}
- apiGroups:
  - coordination.k8s.io
  resources:
  - leases
  verbs:
  - create
- apiGroups:
  - coordination.k8s.io
  resources:
  - leases
  resourceNames:
  - {{ include "unmask-operator.fullname" . }}
  verbs:
  - get
  - update
- apiGroups:
  - apps
  resources:
  - deployments
  resourceNames:
  - {{ include "unmask-operator.fullname" . }}
  verbs:
  - get
{{- end }}

{{- define "unmask-operator.editorRules" -}}
- apiGroups:
  - unmask.dev
  resources:
  - diffusiontrainjobs
  verbs:
  - create
  - delete
  - deletecollection
  - get
  - list
  - patch
  - update
  - watch
- apiGroups:
  - unmask.dev
  resources:
  - diffusiontrainjobs/scale
  verbs:
  - get
  - patch
  - update
- apiGroups:
  - unmask.dev
  resources:
  - diffusiontrainjobs/status
  verbs:
  - get
- apiGroups:
  - unmask.dev
  resources:
  - diffusioninferenceservices
  verbs:
  - create
  - delete
  - deletecollection
  - get
  - list
  - patch
  - update
  - watch
- apiGroups:
  - unmask.dev
  resources:
  - diffusioninferenceservices/scale
  verbs:
  - get
  - patch
  - update
- apiGroups:
  - unmask.dev
  resources:
  - diffusioninferenceservices/status
  verbs:
  - get
{{- end }}

{{- define "unmask-operator.viewerRules" -}}
- apiGroups:
  - unmask.dev
  resources:
  - diffusiontrainjobs
  verbs:
  - get
  - list
  - watch
- apiGroups:
  - unmask.dev
  resources:
  - diffusiontrainjobs/scale
  verbs:
  - get
- apiGroups:
  - unmask.dev
  resources:
  - diffusiontrainjobs/status
  verbs:
  - get
- apiGroups:
  - unmask.dev
  resources:
  - diffusioninferenceservices
  verbs:
  - get
  - list
  - watch
- apiGroups:
  - unmask.dev
  resources:
  - diffusioninferenceservices/scale
  verbs:
  - get
- apiGroups:
  - unmask.dev
  resources:
  - diffusioninferenceservices/status
  verbs:
  - get
{{- end }}

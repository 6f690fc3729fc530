{{- /* Made by `make generate` from values.yaml; change that. */ -}}
{{- define "unmask-inference.standaloneValues" -}}
{
 "model.uri": "",
 "model.name": "",
 "replicas": 1,
 "strategy.maxSurge": 0,
 "strategy.maxUnavailable": 1,
 "server.rows": 8,
 "server.context": null,
 "server.cacheMib": null,
 "server.maxPositions": null,
 "server.maxQueue": 256,
 "server.maxQueueTokens": 1000000,
 "server.device": "",
 "server.quantization": "none",
 "server.threads": null,
 "server.extraArgs": [],
 "control.enabled": false,
 "control.weightsRoot": "",
 "tls.enabled": false,
 "tls.secretName": "",
 "tls.clientCASecretName": "",
 "tls.clientCAKey": "ca.crt",
 "tls.allow": [],
 "gpu.enabled": false,
 "gpu.resource": "nvidia.com/gpu",
 "resources": {
  "requests": {
   "cpu": "1",
   "memory": "2Gi",
   "ephemeral-storage": "64Mi"
  },
  "limits": {
   "memory": "2Gi",
   "ephemeral-storage": "2Gi"
  }
 },
 "sharedMemory": "256Mi",
 "temporaryStorage": "1Gi",
 "probes.startupSeconds": 1800,
 "service.type": "ClusterIP",
 "service.port": 50051,
 "service.metricsPort": 9090,
 "service.httpPort": 8000,
 "service.appProtocol": "kubernetes.io/h2c",
 "service.annotations": {},
 "headlessService.enabled": true,
 "extraEnv": [],
 "extraVolumes": [],
 "extraVolumeMounts": [],
 "affinity": {},
 "topologySpreadConstraints": [],
 "runtimeClassName": ""
}
{{- end }}

{{- define "moestack.labels" -}}
app.kubernetes.io/name: moestack
app.kubernetes.io/component: operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "moestack.selector" -}}
app.kubernetes.io/name: moestack
app.kubernetes.io/component: operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "moestack.image" -}}
{{- $repository := required "image.repository: name the image of operator and gateways (images/README.md says how it is built)" .Values.image.repository -}}
{{- if .Values.image.digest -}}
{{ $repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ $repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- /* The operator's configuration (moe_core.config.OperatorConfig). */ -}}
{{- define "moestack.config" -}}
{{- $config := dict
  "namespaces" .Values.namespaces
  "namespace" .Release.Namespace
  "gatewayImage" (include "moestack.image" .)
  "imagePullPolicy" .Values.image.pullPolicy
  "trustedKeyFiles" (list "/etc/moestack/keys/operator.pub" "/etc/moestack/keys/tuner.pub")
  "signingKeyFile" "/etc/moestack/keys/operator.key"
  "tunerNamespace" .Release.Namespace
  "workers" .Values.operator.workers
  "qps" .Values.operator.qps
  "burst" .Values.operator.burst
  "host" "0.0.0.0"
  "port" 8080
  "logLevel" .Values.operator.logLevel
-}}
{{- if .Values.engineImage }}{{ $_ := set $config "engineImage" .Values.engineImage }}{{ end -}}
{{ $config | toPrettyJson }}
{{- end }}

{{- /* What the restricted Pod Security Standard asks for. */ -}}
{{- define "moestack.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "moestack.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

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

{{- define "moestack.tunerLabels" -}}
{{ merge (dict "app.kubernetes.io/component" "tuner") (include "moestack.labels" . | fromYaml) | toYaml }}
{{- end }}

{{- define "moestack.tunerSelector" -}}
app.kubernetes.io/name: moestack
app.kubernetes.io/component: tuner
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

{{- /* The tuner's configuration (moe_core.config.ClusterTunerConfig). */ -}}
{{- define "moestack.tunerConfig" -}}
{{- $config := dict
  "namespaces" .Values.namespaces
  "namespace" .Release.Namespace
  "prometheusUrl" .Values.tuner.prometheusUrl
  "signingKeyFile" "/etc/moestack/keys/tuner.key"
  "stateDir" "/var/lib/moestack"
  "qps" .Values.tuner.qps
  "burst" .Values.tuner.burst
  "host" "0.0.0.0"
  "port" 8080
  "logLevel" .Values.tuner.logLevel
-}}
{{- with .Values.tuner.console }}
{{- if .enabled }}
{{- $_ := required "tuner.console.tokenSecret.name: name a Secret of the release's namespace with a token of 32 characters or more" .tokenSecret.name }}
{{- $console := dict "readTokenFile" "/etc/moestack/console/read" "hosts" .hosts }}
{{- if .usdPerGpuHour }}{{ $_ := set $console "usdPerGpuHour" .usdPerGpuHour }}{{ end -}}
{{- $_ := set $config "console" $console }}
{{- end }}
{{- end }}
{{- with .Values.tuner.studies }}
{{- if .url }}{{ $_ := set $config "storageUrl" .url }}{{ end -}}
{{- if .passwordSecret.name }}{{ $_ := set $config "storagePasswordFile" "/etc/moestack/studies/password" }}{{ end -}}
{{- end }}
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

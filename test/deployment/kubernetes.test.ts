/**
 * Owns: the manifests for Kubernetes: every file is listed, selectors meet labels, ports and probes what keygate listens on,
 * mounted secrets what the configuration reads, and pods what the restricted standard wants.
 * Must not know: a cluster; nothing is applied here.
 * Runs: node:test; reads the files, and has keygate load the configurations.
 */
import assert from 'node:assert/strict';
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, it } from 'node:test';
import { parseAllDocuments } from 'yaml';
import { parseConfig } from '../../src/config/load.ts';

const root = join(import.meta.dirname, '../../native-config/kubernetes');
const base = join(root, 'base');

interface Mount {
  readonly name: string;
  readonly mountPath: string;
  readonly subPath?: string;
  readonly readOnly?: boolean;
}

interface Container {
  readonly name: string;
  readonly image?: string;
  readonly args?: readonly string[];
  readonly ports?: readonly { readonly name: string; readonly containerPort: number }[];
  readonly volumeMounts?: readonly Mount[];
  readonly securityContext?: Readonly<Record<string, unknown>>;
  readonly [probe: string]: unknown;
}

interface Volume {
  readonly name: string;
  readonly configMap?: { readonly name: string };
  readonly secret?: {
    readonly secretName?: string;
    readonly defaultMode?: number;
    readonly items: readonly { readonly key: string; readonly path: string }[];
  };
}

interface PodSpec {
  readonly terminationGracePeriodSeconds: number;
  readonly automountServiceAccountToken: boolean;
  readonly securityContext: Readonly<Record<string, unknown>>;
  readonly containers: readonly [Container];
  readonly initContainers?: readonly Container[];
  readonly volumes: readonly Volume[];
}

interface Manifest {
  readonly apiVersion: string;
  readonly kind: string;
  readonly metadata: { readonly name: string; readonly labels?: Labels };
  // Of the kinds that are asked for it.
  readonly spec: {
    readonly selector: Labels & { readonly matchLabels?: Labels };
    readonly podSelector: { readonly matchLabels: Labels };
    readonly ports: readonly { readonly name: string; readonly targetPort: string }[];
    readonly ingress: readonly { readonly ports: readonly { readonly port: string }[] }[];
    readonly endpoints: readonly { readonly port: string; readonly authorization: { readonly credentials: Labels } }[];
    readonly template: { readonly metadata: { readonly labels: Labels }; readonly spec: PodSpec };
  };
}

type Labels = Readonly<Record<string, string>>;

interface Kustomization {
  readonly resources: readonly string[];
  readonly patches?: readonly { readonly path: string }[];
  readonly configMapGenerator?: readonly { readonly name: string; readonly files: readonly string[] }[];
}

const kustomization = documentsOf(join(base, 'kustomization.yaml'))[0] as unknown as Kustomization;
const manifests = kustomization.resources.flatMap((file) => documentsOf(join(base, file)));
const deployment = only('Deployment');
const { labels } = deployment.spec.template.metadata;
const pod = deployment.spec.template.spec;
const [keygate] = pod.containers;
const config = parseConfig(readFileSync(join(base, 'keygate.yaml'), 'utf8'), '/etc/keygate/keygate.yaml');

describe('the manifests for Kubernetes', () => {
  it('every file belongs to the kustomization beside it', () => {
    for (const directory of [base, ...overlays()]) {
      const {
        resources,
        patches = [],
        configMapGenerator = [],
      } = documentsOf(join(directory, 'kustomization.yaml'))[0] as unknown as Kustomization;
      const named = [
        'kustomization.yaml',
        ...resources.filter((file) => !file.startsWith('..')),
        ...patches.map(({ path }) => path),
        ...configMapGenerator.flatMap(({ files }) => files),
      ];
      assert.deepEqual(named.toSorted(), readdirSync(directory).toSorted(), directory);
    }
  });

  it('every selector means the pods of the deployment', () => {
    const selected = [
      deployment.spec.selector.matchLabels,
      only('PodDisruptionBudget').spec.selector.matchLabels,
      only('NetworkPolicy').spec.podSelector.matchLabels,
      ...manifests.filter(({ kind }) => kind === 'Service').map(({ spec }) => spec.selector),
    ];
    for (const selector of selected) assert.deepEqual(selector, labels);
    const monitored = only('ServiceMonitor').spec.selector.matchLabels ?? {};
    const services = manifests.filter(
      ({ kind, metadata }) =>
        kind === 'Service' && Object.entries(monitored).every(([label, value]) => metadata.labels?.[label] === value),
    );
    assert.deepEqual(
      services.map(({ metadata }) => metadata.name),
      ['keygate-admin'],
    );
  });

  it('ports are those that keygate listens on, by the names that services, probes and policies use', () => {
    const ports = Object.fromEntries(keygate.ports?.map(({ name, containerPort }) => [name, containerPort]) ?? []);
    const { listen } = config.admin ?? {};
    assert.ok(listen !== undefined && 'port' in listen);
    assert.deepEqual(ports, { https: config.listeners['https']?.bind[0]?.port, admin: listen.port });
    assert.equal(listen.host, '0.0.0.0');
    const named = [
      ...manifests.filter(({ kind }) => kind === 'Service').flatMap(({ spec }) => spec.ports.map((p) => p.targetPort)),
      ...only('NetworkPolicy').spec.ingress.flatMap((rule) => rule.ports.map(({ port }) => port)),
      ...only('ServiceMonitor').spec.endpoints.map(({ port }) => port),
    ];
    for (const name of named) assert.ok(name in ports, name);
    const probes = { startupProbe: '/ready', readinessProbe: '/ready', livenessProbe: '/live' };
    for (const [probe, path] of Object.entries(probes)) {
      const { httpGet } = keygate[probe] as { httpGet: object };
      assert.deepEqual(httpGet, { path, port: 'admin' });
    }
  });

  it('what the configuration reads is mounted, and a PIN only for the group of keygate', () => {
    const mounted = new Map<string, Volume>();
    for (const { name, mountPath, subPath } of keygate.volumeMounts ?? []) {
      const volume = pod.volumes.find((each) => each.name === name);
      assert.ok(volume !== undefined, name);
      if (subPath !== undefined) mounted.set(mountPath, volume);
      for (const { path } of volume.secret?.items ?? []) mounted.set(join(mountPath, path), volume);
    }
    assert.ok(mounted.has(String(keygate.args?.[2])));
    const token = config.admin?.token;
    const pin = config.tokens['hsm']?.pin;
    assert.ok(token !== undefined && 'file' in token && pin !== undefined && 'file' in pin);
    for (const { file } of [token, pin]) {
      const volume = mounted.get(file);
      assert.equal(volume?.secret?.secretName, 'keygate');
      // Kubernetes makes it readable for fsGroup; keygate refuses what others can read (src/config/secret.ts).
      assert.equal(volume.secret.defaultMode, 0o440);
    }
    assert.equal(pod.securityContext['fsGroup'], pod.securityContext['runAsGroup']);
    assert.ok(mounted.has(config.certificates['www']?.chain ?? ''));
    const { credentials } = only('ServiceMonitor').spec.endpoints[0]?.authorization ?? {};
    assert.deepEqual(credentials, { name: 'keygate', key: 'admin-token' });
  });

  it('a pod has time to drain before it is killed', () => {
    const { preStop } = keygate['lifecycle'] as { preStop: { sleep: { seconds: number } } };
    const needed = preStop.sleep.seconds + config.drainDeadlineMs / 1000 + 5;
    assert.ok(
      pod.terminationGracePeriodSeconds >= needed,
      `${pod.terminationGracePeriodSeconds} s, needed ${needed} s`,
    );
  });

  it('pods are what the restricted pod security standard wants, and may write nothing', () => {
    assert.equal(pod.automountServiceAccountToken, false);
    assert.equal(pod.securityContext['runAsNonRoot'], true);
    assert.deepEqual(pod.securityContext['seccompProfile'], { type: 'RuntimeDefault' });
    const dockerfile = readFileSync(join(root, '../../Dockerfile'), 'utf8');
    assert.match(dockerfile, new RegExp(`USER ${String(pod.securityContext['runAsUser'])}`));
    assert.deepEqual(keygate.securityContext, {
      allowPrivilegeEscalation: false,
      readOnlyRootFilesystem: true,
      capabilities: { drop: ['ALL'] },
    });
    assert.ok(keygate.volumeMounts?.every(({ readOnly }) => readOnly === true));
  });

  it('overlays change containers and volumes that the base has, and their configurations load', () => {
    for (const overlay of overlays()) {
      for (const file of readdirSync(overlay)) {
        if (file === 'keygate.yaml') {
          const own = parseConfig(readFileSync(join(overlay, file), 'utf8'), '/etc/keygate/keygate.yaml');
          assert.deepEqual(own.listeners, config.listeners);
          continue;
        }
        for (const { kind, metadata, spec } of documentsOf(join(overlay, file))) {
          if (kind !== 'Deployment') continue;
          assert.equal(metadata.name, deployment.metadata.name);
          const patched = spec.template.spec;
          assert.deepEqual(
            patched.containers.map(({ name }) => name),
            [keygate.name],
          );
          const volumes = new Set([...pod.volumes, ...(patched.volumes ?? [])].map(({ name }) => name));
          for (const { volumeMounts = [] } of [...patched.containers, ...(patched.initContainers ?? [])])
            for (const { name } of volumeMounts) assert.ok(volumes.has(name), `${overlay}: no volume ${name}`);
        }
      }
    }
  });
});

function overlays(): string[] {
  return readdirSync(join(root, 'overlays')).map((name) => join(root, 'overlays', name));
}

function documentsOf(file: string): Manifest[] {
  return parseAllDocuments(readFileSync(file, 'utf8'), { version: '1.1' }).map((document) => {
    assert.deepEqual(document.errors, [], file);
    return document.toJS() as Manifest;
  });
}

function only(kind: string): Manifest {
  const [found, ...others] = manifests.filter((manifest) => manifest.kind === kind);
  assert.ok(found !== undefined && others.length === 0, `there is not one ${kind}`);
  return found;
}

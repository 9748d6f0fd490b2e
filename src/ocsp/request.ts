/**
 * Owns: an OCSP request for one certificate (RFC 6960 4.1), as small as RFC 5019 2.1 wants it.
 * Must not know: how it is sent.
 * Runs: main thread of any process.
 */
import { createHash } from 'node:crypto';
import { CertID, id_pkix_ocsp_nonce, OCSPRequest, Request, TBSRequest } from '@peculiar/asn1-ocsp';
import { AsnConvert, OctetString } from '@peculiar/asn1-schema';
import { AlgorithmIdentifier, Extension } from '@peculiar/asn1-x509';
import type { OcspSubject } from './subject.ts';

/** @param nonce 32 bytes (RFC 9654 2.1); undefined: none, and the responder may send what it has ready. */
export function ocspRequest({ issuer, serial }: OcspSubject, nonce: Buffer | undefined): Buffer {
  const reqCert = new CertID({
    // Nothing depends on its strength, and it is the one that RFC 5019 2.1.1 lets responders rely on.
    hashAlgorithm: new AlgorithmIdentifier({ algorithm: sha1, parameters: null }),
    issuerNameHash: new OctetString(createHash('sha1').update(issuer.name).digest()),
    issuerKeyHash: new OctetString(createHash('sha1').update(issuer.key).digest()),
    serialNumber: new Uint8Array(serial).buffer,
  });
  const requestExtensions = nonce && [
    new Extension({
      extnID: id_pkix_ocsp_nonce,
      extnValue: new OctetString(AsnConvert.serialize(new OctetString(nonce))),
    }),
  ];
  const tbsRequest = new TBSRequest({
    requestList: [new Request({ reqCert })],
    ...(requestExtensions === undefined ? {} : { requestExtensions }),
  });
  return Buffer.from(AsnConvert.serialize(new OCSPRequest({ tbsRequest })));
}

const sha1 = '1.3.14.3.2.26';

#!/bin/bash
# Owns: what is checked of the units, inside a machine that systemd has booted. Prints "ok NAME" or "not ok NAME".
# Runs: as a unit of that machine, started by systemd.image.ts; its last act is to power it off.
set -uo pipefail

page=https://www.example.org/
failed=0
check() {
	local name=$1
	shift
	if "$@" >/tmp/output 2>&1; then echo "ok $name"; else
		echo "not ok $name"
		sed 's/^/    /' /tmp/output
		failed=1
	fi
}
fetch() { curl -sS --max-time 20 --cacert /etc/keygate/www.pem --connect-to "::127.0.0.1:${1:-443}" $page; }
property() { systemctl show -P "$1" keygate.service; }
# $1 tries until the rest succeeds, ten in a second.
await() {
	local tries=$1
	shift
	until "$@"; do
		[ $((tries -= 1)) -gt 0 ] || return 1
		sleep 0.1
	done
}
processes() { cat "/sys/fs/cgroup$(property ControlGroup)/cgroup.procs" "/sys/fs/cgroup/systemd$(property ControlGroup)/cgroup.procs" 2>/dev/null; }

# As README says.
install() {
	useradd --system --home-dir /nonexistent --shell /usr/sbin/nologin keygate &&
		ln -s /opt/keygate/bin/keygate /usr/local/bin/keygate &&
		cp /opt/native-config/systemd/keygate.service /opt/native-config/systemd/keygate.socket /etc/systemd/system/ &&
		cp /opt/native-config/logrotate/keygate /etc/logrotate.d/ &&
		mkdir -m 750 /etc/keygate &&
		cp /opt/keygate.yaml /opt/native-config/softhsm2.conf /etc/keygate/ &&
		chown -R root:keygate /etc/keygate && systemctl daemon-reload
}

provision() {
	export SOFTHSM2_CONF=/etc/keygate/softhsm2.conf
	local module=/usr/lib/softhsm/libsofthsm2.so token=(--token keygate --pin-file /root/pin)
	mkdir -p /var/lib/keygate/tokens
	printf 48151623 >/root/pin
	printf 42424242 >/root/so-pin
	chmod 600 /root/pin /root/so-pin
	keygate token init --module $module --label keygate --pin-file /root/pin --so-pin-file /root/so-pin &&
		keygate key generate --module $module "${token[@]}" --label www --type p256 &&
		keygate key self-sign --module $module "${token[@]}" --label www --dns www.example.org --out /etc/keygate/www.pem &&
		chgrp -R keygate /var/lib/keygate && chmod -R u=rwX,g=rX,o= /var/lib/keygate && chmod 644 /etc/keygate/www.pem &&
		systemd-creds encrypt --with-key=host --name=pin /root/pin /etc/keygate/pin.cred
}

is_confined() {
	local pid status
	for pid in $(processes); do
		status=$(cat "/proc/$pid/status")
		echo "$pid $(tr '\0' ' ' </proc/"$pid"/cmdline)"
		grep -q '^NoNewPrivs:.1$' <<<"$status" && grep -q '^Seccomp:.2$' <<<"$status" || return 1
		grep -q '^CapEff:.0*$' <<<"$status" && grep -q '^CapBnd:.0*$' <<<"$status" || return 1
		[ "$(awk '/^Uid/ { print $2 }' <<<"$status")" = "$(id -u keygate)" ] || return 1
		! grep -q ' rwx' "/proc/$pid/maps" || return 1
	done
	[ "$(processes | wc -l)" -ge 3 ]
}

# $@: what clients come during, one after the other, each of whom must be served.
loses_nobody() {
	rm -f /tmp/done
	(
		for ((client = 0; client < 500; client++)); do
			[ -e /tmp/done ] && break
			fetch >/dev/null || echo lost
		done >/tmp/lost 2>&1
	) &
	local clients=$! failed=0
	"$@" || failed=1
	touch /tmp/done
	wait $clients
	cat /tmp/lost
	[ ! -s /tmp/lost ] && [ $failed = 0 ]
}

# The successor is the service: systemd stops, reloads and restarts it from now on, and there is nobody else.
upgraded() {
	local former
	former=$(property MainPID)
	curl -sS --max-time 60 --unix-socket /run/keygate/admin -X POST -H 'x-keygate: 1' http://localhost/upgrade || return 1
	[ "$(property MainPID)" != "$former" ] && is_active && await 100 is_gone "$former"
}
is_gone() { ! kill -0 "$1" 2>/dev/null; }

# Requests on one connection, on and on; $1 says who is to be killed when the first one was answered.
killed_primary_cuts_nobody() {
	local former
	former=$(property MainPID)
	/opt/keygate/node_modules/.bin/node /opt/guest/one-connection.ts 4000 /tmp/answered >/tmp/one 2>&1 &
	local client=$!
	await 50 test -e /tmp/answered && kill -KILL "$former" || return 1
	await 100 has_main_process_other_than "$former" || return 1
	wait $client
	local failed=$?
	cat /tmp/one
	[ $failed = 0 ] && served && await 100 only_family_of_main_process
}
has_main_process_other_than() { is_active && [ "$(property MainPID)" != "$1" ] && [ "$(property MainPID)" != 0 ]; }
# The workers of the former one have left: a primary and two workers.
only_family_of_main_process() { [ "$(processes | wc -l)" = 3 ]; }

reload_waits() {
	systemctl reload keygate.service && await 50 reloaded
}
reloaded() { [ "$(property StatusText)" = 'serving generation 2' ] && [ "$(property ActiveState)" = active ]; }

logs_rotate() {
	local log=/var/log/keygate/keygate.log
	logrotate --force /etc/logrotate.d/keygate || return 1
	await 50 grep -q logs_reopened $log || return 1
	fetch >/dev/null && await 50 grep -q '"listener":"https"' /var/log/keygate/access.log &&
		[ -s $log.1 ] && [ "$(stat -c %U:%G:%a $log)" = keygate:keygate:640 ] && ls -l /var/log/keygate
}

wrong_pin_is_tried_once() {
	systemctl stop keygate.socket keygate.service
	rm -f /var/log/keygate/*
	printf 00000000 >/root/wrong
	systemd-creds encrypt --with-key=host --name=pin /root/wrong /etc/keygate/pin.cred
	systemctl start keygate.socket
	# The client that starts it, and those who would do so again.
	fetch && return 1
	await 100 has_failed || return 1
	for _ in 1 2 3; do fetch && return 1; done
	systemctl is-active keygate.socket && return 1
	journalctl -u keygate.service --no-pager -o cat
	[ "$(journalctl -u keygate.service --no-pager -o cat | grep -c 'CKR_PIN_INCORRECT')" = 1 ]
}

has_failed() { [ "$(property ExecMainStatus)" = 77 ] && [ "$(property ActiveState)" = failed ]; }

# Away while the host starts; nobody starts keygate by hand.
token_comes_back() {
	systemctl stop keygate.socket keygate.service
	mv /var/lib/keygate/tokens /var/lib/keygate/away && mkdir -m 750 /var/lib/keygate/tokens && chgrp keygate /var/lib/keygate/tokens
	systemctl start keygate.socket && systemctl start --no-block keygate.service
	await 200 was_restarted || return 1
	rmdir /var/lib/keygate/tokens && mv /var/lib/keygate/away /var/lib/keygate/tokens
	await 200 is_active && served
}
was_restarted() { [ "$(property NRestarts)" -ge 2 ]; }

own_ports() {
	systemd-creds encrypt --with-key=host --name=pin /root/pin /etc/keygate/pin.cred
	systemctl stop keygate.socket keygate.service
	mkdir -p /etc/systemd/system/keygate.service.d
	cp /opt/native-config/systemd/drop-ins/own-ports.conf /etc/systemd/system/keygate.service.d/
	systemctl daemon-reload && systemctl start keygate.service && [ "$(fetch)" = hello ]
}

is_active() { systemctl is-active keygate.service; }
served() { [ "$(fetch)" = hello ]; }

check 'keygate is installed' install
check 'the token, the certificate and the credential are made' provision
check 'the units are free of warnings' systemd-analyze verify keygate.service keygate.socket
systemctl start upstream.service keygate.socket
check 'the first client starts keygate and is served' served
check 'systemd hears when keygate is ready' await 300 is_active
check 'every process is confined: no capability, no new privileges, seccomp, no memory that is written and run' is_confined
check 'systemctl reload waits for the outcome' reload_waits
check 'the logs rotate' logs_rotate
check 'a restart loses no client' loses_nobody systemctl restart keygate.service
check 'an upgrade loses no client, and the successor is the service' loses_nobody upgraded
check 'a reload reaches the successor' systemctl reload keygate.service
check 'a killed primary is replaced, and what is established goes on' killed_primary_cuts_nobody
check 'a token that is away when keygate starts is served once it is back' token_comes_back
check 'keygate stops in time' systemctl stop keygate.socket keygate.service
check 'a wrong PIN is tried once, whoever comes' wrong_pin_is_tried_once
check 'with own-ports.conf keygate binds port 443 itself' own_ports
if [ $failed = 1 ]; then journalctl -u keygate.service -u keygate.socket --no-pager | tail -60; fi
echo "guest ended $failed"
systemctl poweroff --no-block

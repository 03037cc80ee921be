"""What the doctor says of a host that lacks something, and what it would install there."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from qemu_postcopy.doctor import HostReport, commands, install, tracing, userfaultfd
from qemu_postcopy.doctor.report import Finding, Status

ALL_FEATURES = 0x1FFFF
EPERM = 1
EACCES = 13

WORKS = userfaultfd.Access(ALL_FEATURES, 0)
REFUSED = userfaultfd.Access(0, EPERM)


def finding(finding_id: str, status: Status, *, essential: bool = False) -> Finding:
    return Finding(finding_id, "area", finding_id, status, "", "", essential=essential)


def test_an_essential_lack_and_nothing_else_stops_the_main_job() -> None:
    optional = finding("optional", "missing")
    restricted = finding("restricted", "warn", essential=True)
    lack = finding("lack", "missing", essential=True)
    assert HostReport({}, (optional, restricted)).can_restore
    report = HostReport({}, (optional, lack, restricted))
    assert not report.can_restore
    assert report.blockers == (lack,)


def test_every_feature_up_to_linux_6_18_has_a_line_and_unknown_bits_are_shown() -> None:
    findings = userfaultfd.feature_findings(ALL_FEATURES | 1 << 17 | 1 << 40)
    assert [f.status for f in findings] == ["ok"] * 19
    assert [f.data["bit"] for f in findings] == [*range(17), 17, 40]
    assert findings[-2].title == "feature bit 17 (0x20000)"


def test_a_missing_feature_is_named_with_its_cost() -> None:
    findings = {f.id: f for f in userfaultfd.feature_findings(ALL_FEATURES & ~(1 << 4))}
    lack = findings["userfaultfd.feature.MISSING_HUGETLBFS"]
    assert lack.status == "missing" and not lack.essential
    assert "huge pages" in lack.cost


@pytest.mark.parametrize(
    ("device", "syscall", "status"),
    [
        (WORKS, WORKS, "ok"),
        (WORKS, REFUSED, "ok"),
        (REFUSED, WORKS, "ok"),
        (REFUSED, REFUSED, "missing"),
    ],
)
def test_one_way_to_a_userfaultfd_is_enough(
    device: userfaultfd.Access, syscall: userfaultfd.Access, status: Status
) -> None:
    assert userfaultfd.access_finding(device, syscall, WORKS).status == status


def test_user_mode_faults_alone_are_refused_with_the_reason() -> None:
    access = userfaultfd.access_finding(REFUSED, REFUSED, WORKS)
    assert access.essential and access.status == "missing"
    assert "UFFD_USER_MODE_ONLY" in access.found
    assert "/dev/userfaultfd" in access.advice


@pytest.mark.parametrize(
    ("child", "stranger", "status"),
    [(0, 0, "ok"), (0, EPERM, "warn"), (EPERM, EPERM, "missing")],
)
def test_ptrace_of_children_only_is_a_restriction(
    child: int, stranger: int, status: Status
) -> None:
    result = tracing.ptrace_finding(child, stranger)
    assert result.status == status
    assert bool(result.advice) == (status != "ok")


@pytest.mark.parametrize(
    ("scope", "capable", "status"),
    [
        (None, False, "ok"),
        ("0", False, "ok"),
        ("1", False, "warn"),
        ("1", True, "ok"),
        ("2", True, "ok"),
        ("3", True, "warn"),
    ],
)
def test_yama_counts_only_where_it_restricts(
    scope: str | None, capable: bool, status: Status
) -> None:
    assert tracing.yama_finding(scope, capable).status == status


LACKING = HostReport(
    {},
    (
        finding("qemu.native", "missing", essential=True),
        finding("tools.static_cc", "missing"),
        finding("libraries.libvirt", "missing"),
    ),
)


LIBVIRT_APT = ["libvirt-daemon-system", "libvirt-clients", "libvirt-dev", "pkg-config"]
LIBVIRT_DNF = ["libvirt-daemon-kvm", "libvirt-client", "libvirt-devel", "pkgconf-pkg-config"]


@pytest.mark.parametrize(
    ("family", "machine", "packages"),
    [
        ("apt", "x86_64", ["qemu-system-x86", "gcc", "libc6-dev", *LIBVIRT_APT]),
        ("apt", "aarch64", ["qemu-system-arm", "gcc", "libc6-dev", *LIBVIRT_APT]),
        ("dnf", "x86_64", ["qemu-kvm", "gcc", "glibc-devel", "glibc-static", *LIBVIRT_DNF]),
    ],
)
def test_packages_are_those_of_the_distribution(
    family: str, machine: str, packages: list[str]
) -> None:
    assert install.packages_for(LACKING, family, machine) == packages


def test_nothing_is_installed_where_nothing_is_missing() -> None:
    healthy = HostReport({}, (finding("qemu.native", "ok"), finding("tools.static_cc", "ok")))
    assert install.packages_for(healthy, "apt", "x86_64") == []
    assert install.plan("apt", [], lists_age_seconds=1e9) == []
    assert install.plan("dnf", [], lists_age_seconds=None) == []


@pytest.mark.parametrize(
    ("age_seconds", "updates"), [(None, True), (60.0, False), (2 * 24 * 3600.0, True)]
)
def test_apt_lists_are_fetched_where_they_are_empty_or_stale(
    age_seconds: float | None, updates: bool
) -> None:
    commands_run = [step.argv for step in install.plan("apt", ["gcc"], age_seconds)]
    assert (("apt-get", "update") in commands_run) == updates
    assert commands_run[-1][:2] == ("apt-get", "install")


def test_empty_apt_lists_are_fetched_even_if_no_package_is_missing() -> None:
    assert [step.argv for step in install.plan("apt", [], None)] == [("apt-get", "update")]


def test_the_line_for_root_asks_no_questions_and_takes_no_recommendations() -> None:
    line = install.as_line(install.plan("apt", ["gcc", "libc6-dev"], None))
    assert line == (
        "apt-get update; env DEBIAN_FRONTEND=noninteractive "
        "apt-get install -y --no-install-recommends gcc libc6-dev"
    )


HOST = {"distribution": "D", "kernel": "K", "architecture": "A", "user": "U"}


@pytest.mark.parametrize(("status", "exit_code"), [("ok", 0), ("warn", 0), ("missing", 3)])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_exit_status_says_whether_the_main_job_can_work(
    monkeypatch: pytest.MonkeyPatch, status: Status, exit_code: int, form: list[str]
) -> None:
    report = HostReport(HOST, (finding("a.b", status, essential=True),))
    monkeypatch.setattr("qemu_postcopy.doctor.probe_host", lambda: report)
    result = CliRunner().invoke(commands.doctor_command, form)
    assert result.exit_code == exit_code, result.output
    if form:
        assert json.loads(result.stdout) == report.to_json()
    else:
        assert "a.b" in result.stdout


def test_a_dry_run_shows_the_commands_and_runs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a command was run")

    monkeypatch.setattr(install, "package_manager", lambda: "apt")
    monkeypatch.setattr(install, "newest_list_age_seconds", lambda: None)
    monkeypatch.setattr("subprocess.run", never)
    monkeypatch.setattr("qemu_postcopy.doctor.probe_host", lambda: LACKING)
    result = CliRunner().invoke(commands.doctor_command, ["--install", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "--no-install-recommends" in result.stderr


def test_json_keys_are_stable() -> None:
    document = HostReport(HOST, (finding("a.b", "ok"),)).to_json()
    assert list(document) == ["schema", "can_restore", "host", "findings"]
    assert document["schema"] == 1
    assert set(document["findings"][0]) == {
        "id",
        "area",
        "title",
        "status",
        "found",
        "cost",
        "advice",
        "essential",
        "data",
    }

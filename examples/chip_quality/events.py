"""Typed events, made by `outbox codegen` from inspection.avsc, manufacturing.avsc, quality.avsc, system.avsc,
user.avsc.

Do not edit: change the .avsc files and run `outbox codegen SCHEMAS THIS_FILE` again.
`outbox codegen --check` finds a module that is stale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, ClassVar, Self
from uuid import UUID

from outbox.message import now, require_aware, uuid7


class InspectionEventType(StrEnum):
    INSPECTION_CREATED = "INSPECTION_CREATED"
    INSPECTION_STARTED = "INSPECTION_STARTED"
    INSPECTION_COMPLETED = "INSPECTION_COMPLETED"
    INSPECTION_FAILED = "INSPECTION_FAILED"
    DEFECT_DETECTED = "DEFECT_DETECTED"
    QUALITY_ASSESSED = "QUALITY_ASSESSED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """One defect found on a chip."""

    defect_type: str
    severity: str
    confidence: float
    """Of the detector, 0 to 1."""
    location: str
    """Where on the chip, in the detector's own words."""

    def to_avro(self) -> dict[str, Any]:
        """The fields as Avro names them."""
        return {
            "defect_type": self.defect_type,
            "severity": self.severity,
            "confidence": self.confidence,
            "location": self.location,
        }

    @classmethod
    def from_avro(cls, data: Mapping[str, Any]) -> Self:
        """Out of the fields that Avro's reader gives."""
        return cls(
            defect_type=data["defect_type"],
            severity=data["severity"],
            confidence=data["confidence"],
            location=data["location"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectionEvent:
    """What happens to one inspection of a chip, from its creation to its assessment."""

    AVRO_RECORD: ClassVar[str] = "com.chipquality.events.inspection.InspectionEvent"
    AVRO_FINGERPRINT: ClassVar[int] = -2866992851546496404

    event_id: UUID = field(default_factory=uuid7)
    """Unique for ever; consumers tell repeats by it."""
    event_type: InspectionEventType
    timestamp: datetime = field(default_factory=now)
    """When it happened, UTC, to the millisecond."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Free text pairs for people and tools; no consumer decides by them."""
    inspection_id: str
    batch_id: str
    chip_id: str
    inspection_type: str
    status: str
    quality_score: float | None = None
    """Null until the inspection was assessed."""
    defects: Sequence[Defect] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_aware(self.timestamp, "InspectionEvent", "timestamp")

    def to_avro(self) -> dict[str, Any]:
        """The fields as Avro names them."""
        return {
            "event_id": self.event_id,
            "event_type": self.event_type,
            "timestamp": self.timestamp,
            "metadata": self.metadata,
            "inspection_id": self.inspection_id,
            "batch_id": self.batch_id,
            "chip_id": self.chip_id,
            "inspection_type": self.inspection_type,
            "status": self.status,
            "quality_score": self.quality_score,
            "defects": [item.to_avro() for item in self.defects],
        }

    @classmethod
    def from_avro(cls, data: Mapping[str, Any]) -> Self:
        """Out of the fields that Avro's reader gives."""
        return cls(
            event_id=data["event_id"],
            event_type=InspectionEventType(data["event_type"]),
            timestamp=data["timestamp"],
            metadata=data["metadata"],
            inspection_id=data["inspection_id"],
            batch_id=data["batch_id"],
            chip_id=data["chip_id"],
            inspection_type=data["inspection_type"],
            status=data["status"],
            quality_score=data["quality_score"],
            defects=[Defect.from_avro(item) for item in data["defects"]],
        )

    @classmethod
    def inspection_created(
        cls,
        *,
        inspection_id: str,
        batch_id: str,
        chip_id: str,
        inspection_type: str,
        status: str,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """An inspection of a chip is ordered."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=InspectionEventType.INSPECTION_CREATED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            inspection_id=inspection_id,
            batch_id=batch_id,
            chip_id=chip_id,
            inspection_type=inspection_type,
            status=status,
        )

    @classmethod
    def inspection_started(
        cls,
        *,
        inspection_id: str,
        batch_id: str,
        chip_id: str,
        inspection_type: str,
        status: str,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """The chip is on the bench."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=InspectionEventType.INSPECTION_STARTED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            inspection_id=inspection_id,
            batch_id=batch_id,
            chip_id=chip_id,
            inspection_type=inspection_type,
            status=status,
        )

    @classmethod
    def inspection_completed(
        cls,
        *,
        inspection_id: str,
        batch_id: str,
        chip_id: str,
        inspection_type: str,
        status: str,
        quality_score: float,
        defects: Sequence[Defect] | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """The inspection is over, with a score."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=InspectionEventType.INSPECTION_COMPLETED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            inspection_id=inspection_id,
            batch_id=batch_id,
            chip_id=chip_id,
            inspection_type=inspection_type,
            status=status,
            quality_score=quality_score,
            defects=[] if defects is None else defects,
        )

    @classmethod
    def inspection_failed(
        cls,
        *,
        inspection_id: str,
        batch_id: str,
        chip_id: str,
        inspection_type: str,
        status: str,
        defects: Sequence[Defect] | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """The inspection could not be done; the defects are those found until then."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=InspectionEventType.INSPECTION_FAILED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            inspection_id=inspection_id,
            batch_id=batch_id,
            chip_id=chip_id,
            inspection_type=inspection_type,
            status=status,
            defects=[] if defects is None else defects,
        )

    @classmethod
    def defect_detected(
        cls,
        *,
        inspection_id: str,
        batch_id: str,
        chip_id: str,
        inspection_type: str,
        status: str,
        defects: Sequence[Defect],
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """Defects were seen."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=InspectionEventType.DEFECT_DETECTED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            inspection_id=inspection_id,
            batch_id=batch_id,
            chip_id=chip_id,
            inspection_type=inspection_type,
            status=status,
            defects=defects,
        )

    @classmethod
    def quality_assessed(
        cls,
        *,
        inspection_id: str,
        batch_id: str,
        chip_id: str,
        inspection_type: str,
        status: str,
        quality_score: float,
        defects: Sequence[Defect] | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """The score was judged."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=InspectionEventType.QUALITY_ASSESSED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            inspection_id=inspection_id,
            batch_id=batch_id,
            chip_id=chip_id,
            inspection_type=inspection_type,
            status=status,
            quality_score=quality_score,
            defects=[] if defects is None else defects,
        )


class ManufacturingEventType(StrEnum):
    BATCH_CREATED = "BATCH_CREATED"
    BATCH_STARTED = "BATCH_STARTED"
    BATCH_COMPLETED = "BATCH_COMPLETED"
    BATCH_FAILED = "BATCH_FAILED"
    LOT_CREATED = "LOT_CREATED"
    LOT_PROCESSED = "LOT_PROCESSED"
    PRODUCTION_MILESTONE = "PRODUCTION_MILESTONE"


@dataclass(frozen=True, slots=True, kw_only=True)
class ManufacturingEvent:
    """What happens to one batch of chips on its way through the plant."""

    AVRO_RECORD: ClassVar[str] = "com.chipquality.events.manufacturing.ManufacturingEvent"
    AVRO_FINGERPRINT: ClassVar[int] = -7135051789462493741

    event_id: UUID = field(default_factory=uuid7)
    """Unique for ever; consumers tell repeats by it."""
    event_type: ManufacturingEventType
    timestamp: datetime = field(default_factory=now)
    """When it happened, UTC, to the millisecond."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Free text pairs for people and tools; no consumer decides by them."""
    batch_id: str
    lot_id: str | None = None
    part_number: str
    quantity: int
    """Chips."""
    status: str
    station_id: str | None = None
    operator_id: str | None = None

    def __post_init__(self) -> None:
        require_aware(self.timestamp, "ManufacturingEvent", "timestamp")

    def to_avro(self) -> dict[str, Any]:
        """The fields as Avro names them."""
        return {
            "event_id": self.event_id,
            "event_type": self.event_type,
            "timestamp": self.timestamp,
            "metadata": self.metadata,
            "batch_id": self.batch_id,
            "lot_id": self.lot_id,
            "part_number": self.part_number,
            "quantity": self.quantity,
            "status": self.status,
            "station_id": self.station_id,
            "operator_id": self.operator_id,
        }

    @classmethod
    def from_avro(cls, data: Mapping[str, Any]) -> Self:
        """Out of the fields that Avro's reader gives."""
        return cls(
            event_id=data["event_id"],
            event_type=ManufacturingEventType(data["event_type"]),
            timestamp=data["timestamp"],
            metadata=data["metadata"],
            batch_id=data["batch_id"],
            lot_id=data["lot_id"],
            part_number=data["part_number"],
            quantity=data["quantity"],
            status=data["status"],
            station_id=data["station_id"],
            operator_id=data["operator_id"],
        )

    @classmethod
    def batch_created(
        cls,
        *,
        batch_id: str,
        part_number: str,
        quantity: int,
        status: str,
        operator_id: str | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """A batch is planned."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=ManufacturingEventType.BATCH_CREATED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            batch_id=batch_id,
            part_number=part_number,
            quantity=quantity,
            status=status,
            operator_id=operator_id,
        )

    @classmethod
    def batch_started(
        cls,
        *,
        batch_id: str,
        part_number: str,
        quantity: int,
        status: str,
        station_id: str | None = None,
        operator_id: str | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """The first chip of the batch is at work."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=ManufacturingEventType.BATCH_STARTED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            batch_id=batch_id,
            part_number=part_number,
            quantity=quantity,
            status=status,
            station_id=station_id,
            operator_id=operator_id,
        )

    @classmethod
    def batch_completed(
        cls,
        *,
        batch_id: str,
        part_number: str,
        quantity: int,
        status: str,
        station_id: str | None = None,
        operator_id: str | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """The last chip of the batch is done."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=ManufacturingEventType.BATCH_COMPLETED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            batch_id=batch_id,
            part_number=part_number,
            quantity=quantity,
            status=status,
            station_id=station_id,
            operator_id=operator_id,
        )

    @classmethod
    def batch_failed(
        cls,
        *,
        batch_id: str,
        part_number: str,
        quantity: int,
        status: str,
        station_id: str | None = None,
        operator_id: str | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """The batch is given up."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=ManufacturingEventType.BATCH_FAILED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            batch_id=batch_id,
            part_number=part_number,
            quantity=quantity,
            status=status,
            station_id=station_id,
            operator_id=operator_id,
        )

    @classmethod
    def lot_created(
        cls,
        *,
        batch_id: str,
        lot_id: str,
        part_number: str,
        quantity: int,
        status: str,
        station_id: str | None = None,
        operator_id: str | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """A lot of the batch is put together."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=ManufacturingEventType.LOT_CREATED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            batch_id=batch_id,
            lot_id=lot_id,
            part_number=part_number,
            quantity=quantity,
            status=status,
            station_id=station_id,
            operator_id=operator_id,
        )

    @classmethod
    def lot_processed(
        cls,
        *,
        batch_id: str,
        lot_id: str,
        part_number: str,
        quantity: int,
        status: str,
        station_id: str,
        operator_id: str | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """A station is done with a lot."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=ManufacturingEventType.LOT_PROCESSED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            batch_id=batch_id,
            lot_id=lot_id,
            part_number=part_number,
            quantity=quantity,
            status=status,
            station_id=station_id,
            operator_id=operator_id,
        )

    @classmethod
    def production_milestone(
        cls,
        *,
        batch_id: str,
        part_number: str,
        quantity: int,
        status: str,
        station_id: str,
        lot_id: str | None = None,
        operator_id: str | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """The batch has come to a station."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=ManufacturingEventType.PRODUCTION_MILESTONE,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            batch_id=batch_id,
            lot_id=lot_id,
            part_number=part_number,
            quantity=quantity,
            status=status,
            station_id=station_id,
            operator_id=operator_id,
        )


class QualityEventType(StrEnum):
    QUALITY_ASSESSED = "QUALITY_ASSESSED"
    THRESHOLD_VIOLATED = "THRESHOLD_VIOLATED"
    ALERT_TRIGGERED = "ALERT_TRIGGERED"
    COMPLIANCE_CHECK = "COMPLIANCE_CHECK"
    QUALITY_APPROVED = "QUALITY_APPROVED"
    QUALITY_REJECTED = "QUALITY_REJECTED"


class AlertLevel(StrEnum):
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"
    CRITICAL = "CRITICAL"


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityEvent:
    """How the quality of one inspection is judged, and the alarms that follow."""

    AVRO_RECORD: ClassVar[str] = "com.chipquality.events.quality.QualityEvent"
    AVRO_FINGERPRINT: ClassVar[int] = 8131572596769205435

    event_id: UUID = field(default_factory=uuid7)
    """Unique for ever; consumers tell repeats by it."""
    event_type: QualityEventType
    timestamp: datetime = field(default_factory=now)
    """When it happened, UTC, to the millisecond."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Free text pairs for people and tools; no consumer decides by them."""
    inspection_id: str
    batch_id: str
    quality_score: float
    threshold: float | None = None
    """The limit that quality_score was held against."""
    pass_fail: bool
    """True: passed."""
    alert_level: AlertLevel | None = None
    defect_count: int = 0

    def __post_init__(self) -> None:
        require_aware(self.timestamp, "QualityEvent", "timestamp")

    def to_avro(self) -> dict[str, Any]:
        """The fields as Avro names them."""
        return {
            "event_id": self.event_id,
            "event_type": self.event_type,
            "timestamp": self.timestamp,
            "metadata": self.metadata,
            "inspection_id": self.inspection_id,
            "batch_id": self.batch_id,
            "quality_score": self.quality_score,
            "threshold": self.threshold,
            "pass_fail": self.pass_fail,
            "alert_level": self.alert_level,
            "defect_count": self.defect_count,
        }

    @classmethod
    def from_avro(cls, data: Mapping[str, Any]) -> Self:
        """Out of the fields that Avro's reader gives."""
        return cls(
            event_id=data["event_id"],
            event_type=QualityEventType(data["event_type"]),
            timestamp=data["timestamp"],
            metadata=data["metadata"],
            inspection_id=data["inspection_id"],
            batch_id=data["batch_id"],
            quality_score=data["quality_score"],
            threshold=data["threshold"],
            pass_fail=data["pass_fail"],
            alert_level=None if data["alert_level"] is None else AlertLevel(data["alert_level"]),
            defect_count=data["defect_count"],
        )

    @classmethod
    def quality_assessed(
        cls,
        *,
        inspection_id: str,
        batch_id: str,
        quality_score: float,
        pass_fail: bool,
        threshold: float | None = None,
        defect_count: int = 0,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """An inspection's score was judged."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=QualityEventType.QUALITY_ASSESSED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            inspection_id=inspection_id,
            batch_id=batch_id,
            quality_score=quality_score,
            threshold=threshold,
            pass_fail=pass_fail,
            defect_count=defect_count,
        )

    @classmethod
    def threshold_violated(
        cls,
        *,
        inspection_id: str,
        batch_id: str,
        quality_score: float,
        threshold: float,
        pass_fail: bool,
        alert_level: AlertLevel | None = None,
        defect_count: int = 0,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """A score is on the wrong side of its threshold."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=QualityEventType.THRESHOLD_VIOLATED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            inspection_id=inspection_id,
            batch_id=batch_id,
            quality_score=quality_score,
            threshold=threshold,
            pass_fail=pass_fail,
            alert_level=alert_level,
            defect_count=defect_count,
        )

    @classmethod
    def alert_triggered(
        cls,
        *,
        inspection_id: str,
        batch_id: str,
        quality_score: float,
        pass_fail: bool,
        alert_level: AlertLevel,
        threshold: float | None = None,
        defect_count: int = 0,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """Somebody has to look."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=QualityEventType.ALERT_TRIGGERED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            inspection_id=inspection_id,
            batch_id=batch_id,
            quality_score=quality_score,
            threshold=threshold,
            pass_fail=pass_fail,
            alert_level=alert_level,
            defect_count=defect_count,
        )

    @classmethod
    def compliance_check(
        cls,
        *,
        inspection_id: str,
        batch_id: str,
        quality_score: float,
        pass_fail: bool,
        threshold: float | None = None,
        defect_count: int = 0,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """A score was held against a rule from outside."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=QualityEventType.COMPLIANCE_CHECK,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            inspection_id=inspection_id,
            batch_id=batch_id,
            quality_score=quality_score,
            threshold=threshold,
            pass_fail=pass_fail,
            defect_count=defect_count,
        )

    @classmethod
    def quality_approved(
        cls,
        *,
        inspection_id: str,
        batch_id: str,
        quality_score: float,
        threshold: float | None = None,
        defect_count: int = 0,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """The chip passed."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=QualityEventType.QUALITY_APPROVED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            inspection_id=inspection_id,
            batch_id=batch_id,
            quality_score=quality_score,
            threshold=threshold,
            pass_fail=True,
            defect_count=defect_count,
        )

    @classmethod
    def quality_rejected(
        cls,
        *,
        inspection_id: str,
        batch_id: str,
        quality_score: float,
        threshold: float | None = None,
        defect_count: int = 0,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """The chip did not pass."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=QualityEventType.QUALITY_REJECTED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            inspection_id=inspection_id,
            batch_id=batch_id,
            quality_score=quality_score,
            threshold=threshold,
            pass_fail=False,
            defect_count=defect_count,
        )


class SystemEventType(StrEnum):
    SERVICE_STARTED = "SERVICE_STARTED"
    SERVICE_STOPPED = "SERVICE_STOPPED"
    HEALTH_CHECK = "HEALTH_CHECK"
    PERFORMANCE_METRIC = "PERFORMANCE_METRIC"
    ERROR_OCCURRED = "ERROR_OCCURRED"
    SYSTEM_ALERT = "SYSTEM_ALERT"


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemEvent:
    """How one service of the platform fares."""

    AVRO_RECORD: ClassVar[str] = "com.chipquality.events.system.SystemEvent"
    AVRO_FINGERPRINT: ClassVar[int] = 3577829885226291254

    event_id: UUID = field(default_factory=uuid7)
    """Unique for ever; consumers tell repeats by it."""
    event_type: SystemEventType
    timestamp: datetime = field(default_factory=now)
    """When it happened, UTC, to the millisecond."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Free text pairs for people and tools; no consumer decides by them."""
    service_name: str
    service_version: str | None = None
    hostname: str | None = None
    status: str
    message: str | None = None
    error_details: str | None = None
    metrics: Mapping[str, str] = field(default_factory=dict)
    """Name to value, as text."""

    def __post_init__(self) -> None:
        require_aware(self.timestamp, "SystemEvent", "timestamp")

    def to_avro(self) -> dict[str, Any]:
        """The fields as Avro names them."""
        return {
            "event_id": self.event_id,
            "event_type": self.event_type,
            "timestamp": self.timestamp,
            "metadata": self.metadata,
            "service_name": self.service_name,
            "service_version": self.service_version,
            "hostname": self.hostname,
            "status": self.status,
            "message": self.message,
            "error_details": self.error_details,
            "metrics": self.metrics,
        }

    @classmethod
    def from_avro(cls, data: Mapping[str, Any]) -> Self:
        """Out of the fields that Avro's reader gives."""
        return cls(
            event_id=data["event_id"],
            event_type=SystemEventType(data["event_type"]),
            timestamp=data["timestamp"],
            metadata=data["metadata"],
            service_name=data["service_name"],
            service_version=data["service_version"],
            hostname=data["hostname"],
            status=data["status"],
            message=data["message"],
            error_details=data["error_details"],
            metrics=data["metrics"],
        )

    @classmethod
    def service_started(
        cls,
        *,
        service_name: str,
        service_version: str,
        hostname: str,
        status: str,
        message: str | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """A process of a service is at work."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=SystemEventType.SERVICE_STARTED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            service_name=service_name,
            service_version=service_version,
            hostname=hostname,
            status=status,
            message=message,
        )

    @classmethod
    def service_stopped(
        cls,
        *,
        service_name: str,
        hostname: str,
        status: str,
        service_version: str | None = None,
        message: str | None = None,
        error_details: str | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """A process of a service has ended."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=SystemEventType.SERVICE_STOPPED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            service_name=service_name,
            service_version=service_version,
            hostname=hostname,
            status=status,
            message=message,
            error_details=error_details,
        )

    @classmethod
    def health_check(
        cls,
        *,
        service_name: str,
        hostname: str,
        status: str,
        service_version: str | None = None,
        message: str | None = None,
        metrics: Mapping[str, str] | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """How a process answered when it was asked."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=SystemEventType.HEALTH_CHECK,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            service_name=service_name,
            service_version=service_version,
            hostname=hostname,
            status=status,
            message=message,
            metrics={} if metrics is None else metrics,
        )

    @classmethod
    def performance_metric(
        cls,
        *,
        service_name: str,
        status: str,
        metrics: Mapping[str, str],
        service_version: str | None = None,
        hostname: str | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """What was measured of a service."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=SystemEventType.PERFORMANCE_METRIC,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            service_name=service_name,
            service_version=service_version,
            hostname=hostname,
            status=status,
            metrics=metrics,
        )

    @classmethod
    def error_occurred(
        cls,
        *,
        service_name: str,
        status: str,
        message: str,
        error_details: str,
        service_version: str | None = None,
        hostname: str | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """A service met an error."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=SystemEventType.ERROR_OCCURRED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            service_name=service_name,
            service_version=service_version,
            hostname=hostname,
            status=status,
            message=message,
            error_details=error_details,
        )

    @classmethod
    def system_alert(
        cls,
        *,
        service_name: str,
        status: str,
        message: str,
        service_version: str | None = None,
        hostname: str | None = None,
        error_details: str | None = None,
        metrics: Mapping[str, str] | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """Somebody has to look after a service."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=SystemEventType.SYSTEM_ALERT,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            service_name=service_name,
            service_version=service_version,
            hostname=hostname,
            status=status,
            message=message,
            error_details=error_details,
            metrics={} if metrics is None else metrics,
        )


class UserEventType(StrEnum):
    USER_LOGIN = "USER_LOGIN"
    USER_LOGOUT = "USER_LOGOUT"
    USER_CREATED = "USER_CREATED"
    USER_UPDATED = "USER_UPDATED"
    PERMISSION_GRANTED = "PERMISSION_GRANTED"
    PERMISSION_REVOKED = "PERMISSION_REVOKED"
    AUDIT_ACTION = "AUDIT_ACTION"


@dataclass(frozen=True, slots=True, kw_only=True)
class UserEvent:
    """What a person does on the platform, for the audit."""

    AVRO_RECORD: ClassVar[str] = "com.chipquality.events.user.UserEvent"
    AVRO_FINGERPRINT: ClassVar[int] = -2503092678196793214

    event_id: UUID = field(default_factory=uuid7)
    """Unique for ever; consumers tell repeats by it."""
    event_type: UserEventType
    timestamp: datetime = field(default_factory=now)
    """When it happened, UTC, to the millisecond."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Free text pairs for people and tools; no consumer decides by them."""
    user_id: str
    username: str | None = None
    action: str
    resource: str | None = None
    """What the action was done to."""
    ip_address: str | None = None
    user_agent: str | None = None
    success: bool = True

    def __post_init__(self) -> None:
        require_aware(self.timestamp, "UserEvent", "timestamp")

    def to_avro(self) -> dict[str, Any]:
        """The fields as Avro names them."""
        return {
            "event_id": self.event_id,
            "event_type": self.event_type,
            "timestamp": self.timestamp,
            "metadata": self.metadata,
            "user_id": self.user_id,
            "username": self.username,
            "action": self.action,
            "resource": self.resource,
            "ip_address": self.ip_address,
            "user_agent": self.user_agent,
            "success": self.success,
        }

    @classmethod
    def from_avro(cls, data: Mapping[str, Any]) -> Self:
        """Out of the fields that Avro's reader gives."""
        return cls(
            event_id=data["event_id"],
            event_type=UserEventType(data["event_type"]),
            timestamp=data["timestamp"],
            metadata=data["metadata"],
            user_id=data["user_id"],
            username=data["username"],
            action=data["action"],
            resource=data["resource"],
            ip_address=data["ip_address"],
            user_agent=data["user_agent"],
            success=data["success"],
        )

    @classmethod
    def user_login(
        cls,
        *,
        user_id: str,
        action: str,
        ip_address: str,
        username: str | None = None,
        user_agent: str | None = None,
        success: bool = True,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """Somebody came in, or was not let in."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=UserEventType.USER_LOGIN,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            user_id=user_id,
            username=username,
            action=action,
            ip_address=ip_address,
            user_agent=user_agent,
            success=success,
        )

    @classmethod
    def user_logout(
        cls,
        *,
        user_id: str,
        action: str,
        username: str | None = None,
        ip_address: str | None = None,
        user_agent: str | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """Somebody went out."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=UserEventType.USER_LOGOUT,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            user_id=user_id,
            username=username,
            action=action,
            ip_address=ip_address,
            user_agent=user_agent,
        )

    @classmethod
    def user_created(
        cls,
        *,
        user_id: str,
        username: str,
        action: str,
        ip_address: str | None = None,
        user_agent: str | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """There is a new user."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=UserEventType.USER_CREATED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            user_id=user_id,
            username=username,
            action=action,
            ip_address=ip_address,
            user_agent=user_agent,
        )

    @classmethod
    def user_updated(
        cls,
        *,
        user_id: str,
        action: str,
        username: str | None = None,
        resource: str | None = None,
        ip_address: str | None = None,
        user_agent: str | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """What is known of a user has changed."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=UserEventType.USER_UPDATED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            user_id=user_id,
            username=username,
            action=action,
            resource=resource,
            ip_address=ip_address,
            user_agent=user_agent,
        )

    @classmethod
    def permission_granted(
        cls,
        *,
        user_id: str,
        action: str,
        resource: str,
        username: str | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """A user may do something with a resource from now on."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=UserEventType.PERMISSION_GRANTED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            user_id=user_id,
            username=username,
            action=action,
            resource=resource,
        )

    @classmethod
    def permission_revoked(
        cls,
        *,
        user_id: str,
        action: str,
        resource: str,
        username: str | None = None,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """A user may not do it any more."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=UserEventType.PERMISSION_REVOKED,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            user_id=user_id,
            username=username,
            action=action,
            resource=resource,
        )

    @classmethod
    def audit_action(
        cls,
        *,
        user_id: str,
        action: str,
        resource: str,
        username: str | None = None,
        ip_address: str | None = None,
        user_agent: str | None = None,
        success: bool = True,
        event_id: UUID | None = None,
        timestamp: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """Somebody did, or tried to do, what the audit has to know."""
        return cls(
            event_id=uuid7() if event_id is None else event_id,
            event_type=UserEventType.AUDIT_ACTION,
            timestamp=now() if timestamp is None else timestamp,
            metadata={} if metadata is None else metadata,
            user_id=user_id,
            username=username,
            action=action,
            resource=resource,
            ip_address=ip_address,
            user_agent=user_agent,
            success=success,
        )


EVENTS = (
    InspectionEvent,
    ManufacturingEvent,
    QualityEvent,
    SystemEvent,
    UserEvent,
)
